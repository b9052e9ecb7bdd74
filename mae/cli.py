"""The command line: composes a config from conf/ and the overrides, checks it, and launches it. Imports no torch.

`mae ...` and `python run.py ...` are the same, but that `mae` has subcommands for what else the program can do.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us, who say them in a sentence
if "OMP_WAIT_POLICY" not in os.environ:  # OpenMP's threads spin for long while they wait, and starve others on shared
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # cores; not to spin at all halves the speed on idle ones

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from mae.config import from_run, sweep_members, sweep_names  # noqa: E402
from mae.config.check import check_config, resolve  # noqa: E402
from mae.config.compose import CONF, chosen_groups, register_resolvers  # noqa: E402
from mae.config.overrides import by_key  # noqa: E402
from mae.config.unused import refuse_unused, refuse_unused_of_resumed  # noqa: E402
from mae.errors import DEBUG, UserError  # noqa: E402
from mae.launch import errors, launch  # noqa: E402
from mae.launch.slurm import plugin, status  # noqa: E402
from mae.launch.sweep import INTERRUPTED, SweepOfCommand  # noqa: E402
from mae.program import PROGRAM, program  # noqa: E402

MULTIRUN = {"-m", "--multirun"}
SWEEP = SweepOfCommand()


class Failed(Exception):
    """A member of a sweep ended with an exit code other than 0; its error has been printed."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose_and_run(cfg: DictConfig) -> None:
    """One run, or one member of a sweep."""
    try:
        code = run(cfg)
    except Exception as error:
        if DEBUG:
            raise
        if collects_members():
            here = HydraConfig.get()
            SWEEP.refuse(Path(here.sweep.dir, here.sweep.subdir), errors.explain(error))
            return
        sys.stderr.write(f"{errors.explain(error)}\n")
        code = 1
    if code and plugin.in_plugin_job():
        plugin.leave(code)
    if code == INTERRUPTED and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise KeyboardInterrupt  # the whole sweep was asked to stop, not this member alone
    if code and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise Failed(code)  # so that Hydra runs the other members
    if code:
        sys.exit(code)


def collects_members() -> bool:
    """Whether Hydra calls us for each member of a sweep in this process and waits for no result: then all of them are
    checked before the first one runs. Plugins, such as the sweeper of Optuna, run each as it comes."""
    here = HydraConfig.get()
    targets = [str(choice.get("_target_")) for choice in (here.launcher, here.sweeper)]
    own = [target.startswith("hydra._internal.core_plugins.basic_") for target in targets]
    return here.mode == RunMode.MULTIRUN and all(own)


def run(cfg: DictConfig) -> int:
    """Checks a composed config and launches it, or leaves it to the end of a sweep; returns the exit code."""
    if plugin.in_plugin_job():
        plugin.join()
    here = HydraConfig.get()
    cfg, overrides = sweep_members.with_member(cfg, here.overrides.task)
    cfg = from_run.with_run_values(cfg, overrides)
    overrides = from_run.without_taken(overrides)
    if here.mode == RunMode.MULTIRUN and not cfg.output_dir:
        OmegaConf.update(cfg, "output_dir", os.path.join(here.sweep.dir, here.sweep.subdir))
    typed = list(overrides)
    overrides += from_run.own_names(cfg, without_typed(here.runtime.choices, overrides))
    goes_on = bool(cfg.replay or cfg.resume)
    if cfg.replay:
        cfg, overrides = from_run.replayed(cfg, overrides)
    elif cfg.resume:
        cfg, overrides = from_run.resumed(cfg, overrides)
    checked = check_config(resolve(cfg))
    # a run of an earlier version that names what does nothing goes on
    (refuse_unused_of_resumed if goes_on else refuse_unused)(checked, typed)
    if checked.dry_run:
        from mae.tools import dry_run

        text, seconds = dry_run.plan_text(checked)
        sys.stdout.write(text)
        if here.mode == RunMode.MULTIRUN:
            sys.stdout.write("\n")
            SWEEP.plan(Path(here.sweep.dir, here.sweep.subdir), seconds)
        return 0
    if collects_members() or here.mode == RunMode.MULTIRUN and launch.queues(checked):
        launch.check_start(checked, overrides)
        SWEEP.members.append((checked, overrides))
        return 0
    if here.mode == RunMode.MULTIRUN:
        SWEEP.directories.add(here.sweep.dir)
    return launch.launch(checked, overrides)


def without_typed(choices: Mapping[str, Any], overrides: list[str]) -> dict[str, str]:
    """The files of groups that were chosen by another way than the command line, such as an experiment."""
    typed = chosen_groups(overrides)
    return {group: str(choice) for group, choice in choices.items() if group not in typed}


def start() -> int:
    """The command, one run or a whole sweep; returns the exit code."""
    try:
        if status.is_status_command(sys.argv[1:]):
            return status.status_command(sys.argv[1:])
        sys.argv[1:] = flags_first(sys.argv[1:])
        refuse_directories(sys.argv[1:])
        sys.argv[1:] = from_run.with_groups(sys.argv[1:])
        compose_and_run()
        return SWEEP.run()
    except Failed as failed:
        return failed.args[0]
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if DEBUG:
            raise
        sys.stderr.write(f"{errors.explain(error)}\n")
        return 1


def flags_first(arguments: list[str]) -> list[str]:
    """The arguments with `-m` before the overrides: Hydra's parser refuses one that stands between them."""
    return sorted(arguments, key=lambda argument: argument not in MULTIRUN)


def refuse_directories(arguments: list[str]) -> None:
    """Raises UserError for Hydra's own keys of directories that would do nothing."""
    keys = by_key(arguments)
    if "hydra.run.dir" in keys:
        raise UserError("hydra.run.dir is not the run's directory here: name that as output_dir=DIR.")
    if "hydra.sweep.dir" in keys and not MULTIRUN & set(arguments) and "hydra.mode" not in keys:
        raise UserError("hydra.sweep.dir is of a sweep, which -m starts: name a run's directory as output_dir=DIR.")


def compose() -> int:
    """A command without a subcommand: a run, a sweep or the status of one; returns the exit code."""
    sweep_names.register()
    register_resolvers()
    exit_code = start()
    if os.environ.get("RANK", "0") == "0":
        if SWEEP.planned:
            from mae.tools import dry_run

            sys.stdout.write(dry_run.total(SWEEP.planned.values()))
        SWEEP.end()
    return exit_code


@dataclass(frozen=True)
class Subcommand:
    """A word after `mae`: a function of the program, or the key of a directory."""

    usage: str
    does: str
    path: str = ""  # `module:function` of the arguments
    key: str = ""  # `mae WORD DIR ...` is `KEY=DIR ...`


SUBCOMMANDS = {
    "status": Subcommand("DIR", "status of a run or a sweep, and why its members failed", key="status"),
    "cancel": Subcommand("DIR", "takes the jobs of a directory out of SLURM's queue", key="cancel"),
    "retry": Subcommand("DIR", "submits failed runs again", key="retry_failed"),
    "runs": Subcommand("[DIR]", "a table of all runs: state, main result, age, differing keys", "tools.runs:main"),
    "report": Subcommand("RUN...", "the page of a run, or of several side by side", "report.run:main"),
    "sweep": Subcommand("DIR", "table, figure and page of a sweep", "report.sweep:main"),
    "search": Subcommand("DIR ...", "a search of keys by Optuna", "tools.search:main"),
    "pack": Subcommand("OUT data=...", "images into shards", "data.pack:main"),
    "checkpoints": Subcommand("RUN", "a run's checkpoints: step, epoch, size, valid or not, digest", "checkpoint:main"),
    "workspace": Subcommand("ENTITY PROJECT", "lays out a W&B project", "tools.workspace:main"),
}


def command() -> int:
    """`mae ...`, the installed command; returns the exit code."""
    os.environ.setdefault(PROGRAM, "mae")
    return main()


def main() -> int:
    """`python run.py ...`; returns the exit code."""
    word, *arguments = sys.argv[1:] or [""]
    if word in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        if word == "help":
            return 0
    if word == "--version":
        sys.stdout.write(f"mae {version()}\n")
        return 0
    if sys.argv[1:] == ["-sc", "query=bash"] and len(os.environ.get("COMP_LINE", "").split()) <= 2:
        sys.stdout.write(" ".join(SUBCOMMANDS) + "\n")  # before what Hydra completes: groups and keys
    subcommand = SUBCOMMANDS.get(word)
    if subcommand is None:
        return compose()
    if subcommand.key:
        if not arguments:
            sys.stderr.write(f"usage: {program()} {word} {subcommand.usage}\n")
            return 2
        sys.argv[1:] = [f"{subcommand.key}={arguments[0]}", *arguments[1:]]
        return compose()
    sys.argv = [f"{program()} {word}", *arguments]
    return call_subcommand(subcommand, arguments)


def call_subcommand(subcommand: Subcommand, arguments: Sequence[str]) -> int:
    """Imports the function of a subcommand and calls it; returns the exit code."""
    module, _, function = subcommand.path.partition(":")
    try:
        return getattr(importlib.import_module(f"mae.{module}"), function)(list(arguments))
    except Exception as error:
        if DEBUG:
            raise
        sys.stderr.write(f"{errors.explain(error)}\n")
        return 1


def version() -> str:
    """The version of the installed package, or that it is not installed."""
    try:
        return importlib.metadata.version("mae-experiments")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: pip install -e .)"


def usage() -> str:
    """The subcommands."""
    lines = [f"  {program()} {word:11} {entry.usage:15} {entry.does}" for word, entry in SUBCOMMANDS.items()]
    return "\n".join(["Commands:", "", *lines, f"  {program()} KEY=VALUE ...           a run, as below", ""]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
