"""What a command takes over from the run that its `init` names: the model and the data, where it says neither itself.

So `python run.py task=evaluate init=RUN` evaluates the run's network on the run's data. Imports no torch.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from mae import config

SECTIONS = ("model", "data")
Compose = Callable[[list[str]], DictConfig]  # a command line -> its config, not yet resolved


def run_of(init: str) -> Path | None:
    """The directory of the run that `init` names, or of whose checkpoints it names one; None for other files."""
    place = Path(init).expanduser().absolute()
    runs = (place, *place.parents[1:3])  # RUN, RUN/checkpoints/STEP, RUN/checkpoints/STEP/FILE
    return next((run for run in runs if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir()), None)


def stands_for(init: str) -> Path | None:
    """The checkpoint that a run's directory or a link, which name others as the run goes on, stand for now."""
    place = Path(init).expanduser()
    if run_of(init) == place.absolute():
        return max((place / "checkpoints").glob("step_*"), default=None)
    return place.resolve() if place.is_symlink() else None


def inherited(cfg: DictConfig, overrides: Sequence[str], compose: Compose) -> DictConfig:
    """The config with the groups `model` and `data` of the run that `init` names, each where the command line chooses
    none, and with its single keys winning. An experiment chooses both.

    Raises ConfigError where the run's own config cannot be read.
    """
    run = run_of(cfg.init) if isinstance(cfg.init, str) else None
    given = {one.lstrip("+~").split("=")[0] for one in overrides}
    sections = [] if "experiment" in given else [name for name in SECTIONS if name not in given]
    if run is None or not sections:
        return cfg
    stored = config.stored(run)
    sections = [name for name in sections if "name" in stored.get(name, {})]
    try:
        made = compose([*overrides, *(f"{name}={stored[name].name}" for name in sections)])
    except MissingConfigException:  # a group file of the user's that is gone, or a name given by hand
        return cfg
    for name in sections:
        for key, value in stored[name].items():
            follows = OmegaConf.is_interpolation(made[name], key) and ("data" not in sections or f"data.{key}" in given)
            if key in made[name] and f"{name}.{key}" not in given and not follows:
                made[name][key] = value
    if os.environ.get("RANK", "0") == "0":
        taken = " and ".join(f"{name}={made[name].name}" for name in sections)
        sys.stderr.write(f"init={cfg.init}: {taken} {'are' if len(sections) > 1 else 'is'} that run's\n")
    return made
