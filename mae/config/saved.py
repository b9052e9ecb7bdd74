"""The config and command line that a run's directory holds, of whichever version. Imports no torch.

A checkpoint's manifest holds them too, for those who copy its folder: it is then read as a run's directory is.
"""

import logging
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from mae.config.check import check_config, to_dict
from mae.config.versions import FORMAT, FORMAT_KEY, Changes, as_of_today
from mae.errors import UserError
from mae.runs.checkpoints import MANIFEST, RUN_CONFIG, RUN_OVERRIDES, describes_itself
from mae.runs.files import read_json, write_text

log = logging.getLogger(__name__)

WARNED: set[Path] = set()  # runs of other versions that a warning of this process has named


def stored_config(run: Path) -> DictConfig:
    """The saved config of a run, as it is. Raises UserError where there is none."""
    path = run / "config.yaml"
    if not path.is_file() and describes_itself(run):
        return DictConfig(read_json(run / MANIFEST)[RUN_CONFIG])
    if not path.is_file():
        raise UserError(f"{run} is not the directory of a run: it holds no config.yaml.")
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} does not hold a configuration.")
    return config


def stored_overrides(run: Path) -> list[str]:
    """The command line of a run; empty where there is none."""
    path = run / "overrides.yaml"
    overrides = OmegaConf.load(path) if path.is_file() else read_json(run / MANIFEST).get(RUN_OVERRIDES)
    return [str(override) for override in overrides] if isinstance(overrides, list | ListConfig) else []


def write_config(run: Path, cfg: DictConfig) -> None:
    """Leaves a checked config in a run's directory, with the number of its format."""
    write_text(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(with_format(cfg))))


def with_format(cfg: DictConfig) -> dict[str, Any]:
    """A checked config as it is stored."""
    return {FORMAT_KEY: FORMAT, **to_dict(cfg)}


def read_config(run: Path) -> DictConfig:
    """The saved config of a run with today's keys, whichever version wrote it (see `mae.config.versions`).

    Keys and types are checked; ranges and rules are not, nor whether the data are still there. Raises UserError where
    there is no config.
    """
    values, changes = as_of_today(to_dict(stored_config(run)), stored_overrides(run))
    _warn_once(run, changes)
    return check_config(OmegaConf.create(values), values=False)


def _warn_once(run: Path, changes: Changes) -> None:
    """Names what another version's config lacked, and what it holds that is no key any more."""
    if run.absolute() in WARNED or os.environ.get("RANK", "0") != "0":
        return
    for sentence in changes.sentences():
        WARNED.add(run.absolute())
        log.warning("%s %s", run / (MANIFEST if describes_itself(run) else "config.yaml"), sentence)
