"""The sweep that a command runs: all its members are checked before the first one starts. Imports no torch."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from mae.errors import DEBUG
from mae.launch import errors, launch
from mae.launch.slurm.verdict import INTERRUPTED
from mae.runs.layout import SWEEP_RECORD


@dataclass
class SweepOfCommand:
    """The members of `-m` in the order of the command, and what became of them."""

    members: list[tuple[DictConfig, list[str]]] = field(default_factory=list)  # (checked config, its command line)
    refused: list[str] = field(default_factory=list)  # names of members whose configs are not possible
    directories: set[str] = field(default_factory=set)  # in which members ran: a report is made of each
    planned: dict[Path, float] = field(default_factory=dict)  # directory of a member of a dry run -> its seconds

    def refuse(self, directory: Path, sentence: str) -> None:
        """Notes a member that cannot run, and says why at once."""
        self.refused.append(directory.name)
        say(f"member {directory.name} is refused: {sentence}")
        remove_empty(directory)

    def plan(self, directory: Path, seconds: float) -> None:
        """Notes the time of a member of a dry run."""
        self.planned[directory] = seconds

    def run(self) -> int:
        """Runs the members here one after another, or submits them together; returns the exit code.

        A member that fails does not end the others; a signal ends the sweep. Nothing is submitted where a member was
        refused.
        """
        queued = [member for member in self.members if launch.queues(member[0])]
        here = [member for member in self.members if not launch.queues(member[0])]
        codes = [1] * bool(self.refused)
        for number, (cfg, overrides) in enumerate(here, start=1):
            directory = Path(cfg.output_dir)
            say(f"member {number} of {len(here)}: {directory.name}")
            self.directories.add(str(directory.parent))
            code = _code_of(cfg, overrides)
            if code == INTERRUPTED:
                return code
            codes.append(code)
        launch.report_pipelines(here)
        if queued and not self.refused:
            codes.append(launch.launch_sweep(queued))
        return next((code for code in codes if code), 0)

    def end(self) -> None:
        """Writes table, figure and report of each directory, and prints what came out."""
        for directory in sorted(self.directories):
            from mae.report import sweep

            sys.stdout.write(sweep.finish_sweep(Path(directory)))
        remove_planned(self.planned)
        if self.directories and self.refused:
            sys.stdout.write(f"Refused, see above: {', '.join(self.refused)}.\n")


def say(line: str) -> None:
    """A line on the console of the first process."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{line}\n")


def remove_planned(directories: Iterable[Path]) -> None:
    """Removes what Hydra left in the directories of a dry run, and their parent where nothing else is in it."""
    for directory in directories:
        remove_empty(directory)
    for parent in {directory.parent for directory in directories}:
        if [path.name for path in parent.iterdir()] == [SWEEP_RECORD]:
            (parent / SWEEP_RECORD).unlink()
            remove_empty(parent)


def remove_empty(directory: Path) -> None:
    """Removes a directory that Hydra made for a member and that nothing was written to."""
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _code_of(cfg: DictConfig, overrides: list[str]) -> int:
    """Launches a member; returns its exit code, and prints the error of one that fails."""
    try:
        return launch.launch(cfg, overrides)
    except Exception as error:
        if DEBUG:
            raise
        sys.stderr.write(f"{errors.explain(error)}\n")
        return 1
