"""A sweep over named members: each is a list of overrides in the sweep's file. Imports no torch.

`members:` of a file in sweeps/ maps names to overrides, and the key `member` chooses one of them. A sweep whose members
differ in several keys or groups, as a table of a paper does, is a sweep over `member`.
"""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from mae.config.compose import CONF, composed, register_resolvers
from mae.config.from_run import chosen_by_member
from mae.config.overrides import by_key, key_of, values_of
from mae.config.values import near
from mae.errors import UserError

MEMBER = "member"
MEMBERS = "members"
SWEEPS = "sweeps"


def with_member(cfg: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The config of the member that `member=NAME` chooses, and its command line; without one, both as they are.

    What a member sets wins over the rest of the command line. Raises UserError for a name that the file lacks.
    """
    members, name = _taken(cfg)
    if name is None:
        return cfg, list(overrides)
    if name not in members:
        raise UserError(
            f"member={name} is none of the members of {sweep_name(overrides)}: choose one of "
            f"{', '.join(members)}.{near(str(name), list(members))}"
        )
    chosen = [str(override) for override in members[name]]
    keys = {key_of(override) for override in chosen}
    if "init" in keys and (init := by_key(overrides).get("init")):
        raise UserError(
            f"{init.input_line} does nothing: each member of {sweep_name(overrides)} has an init of its own. Leave it "
            "out, or add a member, as '+members.mine=[\"init=RUN\"]'."
        )
    same = [override for override in overrides if key_of(override) not in keys]
    command = [*chosen_by_member(same, keys), *chosen]
    cfg = composed(command)
    _taken(cfg)
    return cfg, command


def _taken(cfg: DictConfig) -> tuple[dict[str, list[Any]], str | None]:
    """The members of a config and the chosen one. Both are then gone from it."""
    register_resolvers()
    name = cfg.get(MEMBER)
    members = OmegaConf.to_container(cfg[MEMBERS], resolve=True) if name is not None and MEMBERS in cfg else {}
    with open_dict(cfg):
        cfg.pop(MEMBERS, None)
        cfg.pop(MEMBER, None)
    assert isinstance(members, dict)
    return {str(key): value for key, value in members.items()}, None if name is None else str(name)


def sweep_name(overrides: Sequence[str]) -> str:
    """`table1` of `+sweeps=table1`; `member` where a command line names no sweep."""
    chosen = by_key(overrides).get(SWEEPS)
    return str(values_of(chosen)[0]) if chosen is not None else MEMBER


def listed_values(name: str, key: str) -> list[str]:
    """The members, or the values of another key, that sweeps/NAME.yaml lists, in its order; empty without a list."""
    path = CONF / SWEEPS / f"{name}.yaml"
    file = OmegaConf.load(path) if path.exists() else OmegaConf.create({})
    if key == MEMBER:
        return [str(member) for member in OmegaConf.select(file, MEMBERS) or {}]
    params = OmegaConf.select(file, "hydra.sweeper.params") or {}
    return str(params[key]).split(",") if key in params else []
