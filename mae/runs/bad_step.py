"""What a run leaves of its first step that is not finite, in `bad_step/`. Imports no torch.

`bad_step/` is a run's directory of its own, in which `replay=RUN` runs. It holds `bad_step.json`, the checkpoint from
which the steps up to that one can be repeated, and after a replay its report and log.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from mae.errors import UserError
from mae.runs.checkpoints import checkpoints_of, damage, step_of
from mae.runs.file_system import hard_link
from mae.runs.files import read_json, write_json, write_text
from mae.runs.layout import BAD_STEP, CHECKPOINTS

RECORD, REPORT_TEXT = "bad_step.json", "replay.txt"
MICRO_BATCH_SIZE = "micro_batch_size.json"  # of task.micro_batch_size=auto, which a replay takes over


@dataclass(frozen=True)
class BadStep:
    """The first step of a run whose loss or gradient is not finite."""

    step: int  # optimizer steps before it
    epoch: int
    step_of_epoch: int
    processes: int
    images: list[int]  # their indices, in the order of the step
    checkpoint: int | None  # step of the checkpoint in `bad_step/`; None: a replay starts from the beginning
    seen_at: int  # the log point's step, whose weights were examined
    block: str | None  # where the first value that is not finite arose; None: those weights gave none
    findings: list[str]  # a sentence or more of each process


def bad_step_dir(run: Path) -> Path:
    """The directory of a run in which its bad step is."""
    return run / BAD_STEP


def has_bad_step(run: Path) -> bool:
    """Whether a run has left a bad step."""
    return (run / BAD_STEP / RECORD).is_file()


def write_bad_step(run: Path, bad: BadStep) -> None:
    """Leaves the record, once the checkpoint is there. A replay finds either all or nothing."""
    (run / BAD_STEP / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    if (run / MICRO_BATCH_SIZE).is_file():
        shutil.copy(run / MICRO_BATCH_SIZE, run / BAD_STEP)
    write_json(run / BAD_STEP / RECORD, dataclasses.asdict(bad), indent=1)


def save_start(run: Path, step: int) -> int | None:
    """Links the newest whole checkpoint up to `step` into `bad_step/`, or copies it where files cannot be linked.

    It then stays when the run removes its own. Returns its step; None where there is none.
    """
    earlier = [path for path in checkpoints_of(run) if step_of(path) <= step and not damage(path, digests=False)]
    folder = run / BAD_STEP / CHECKPOINTS
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed here
    if not earlier:
        return None
    shutil.copytree(earlier[-1], folder / earlier[-1].name, copy_function=hard_link)
    return step_of(earlier[-1])


def read_bad_step(run: Path) -> BadStep:
    """The bad step of a run. Raises UserError where it has none, or where its record is damaged."""
    if not has_bad_step(run):
        raise UserError(
            f"replay={run}: this run has left no bad step: every loss and gradient was finite at its log points. "
            "There is nothing to replay."
        )
    record = run / BAD_STEP / RECORD
    try:
        return BadStep(**read_json(record))
    except TypeError as error:
        raise UserError(f"replay={run}: {record} is damaged, or of another version of this program.") from error


def write_replay(run: Path, text: str) -> None:
    """Leaves the report of a replay whose directory is `run`."""
    write_text(run / REPORT_TEXT, text)


def read_replay(run: Path) -> str:
    """The report of a replay whose directory is `run`."""
    return (run / REPORT_TEXT).read_text()
