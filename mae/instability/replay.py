"""`replay=RUN`: repeats the steps up to the first one that was not finite, and looks at every operation of that."""

import logging
import time
from pathlib import Path

from omegaconf import DictConfig

from mae import device
from mae.config.build import call
from mae.distributed.ranks import Ranks
from mae.instability.watch import Finding, examine
from mae.instability.words import advice, details, origin
from mae.runs.bad_step import REPORT_TEXT, BadStep, read_bad_step, write_replay
from mae.step import accumulate, take_step
from mae.tracking.base import Tracker
from mae.training import Training, set_up

log = logging.getLogger(__name__)


def replay(run: Path, cfg: DictConfig, ranks: Ranks) -> None:
    """Replays in `run`, the directory `bad_step` of the run that `replay` names, and leaves a report there."""
    begun, bad = time.perf_counter(), read_bad_step(Path(cfg.replay))
    t = call(set_up, cfg.task, run, cfg, ranks, Tracker())
    first = t.progress.step
    log.info("repeating %d steps, from step %d to the bad one", bad.step - first, first)
    with ranks.watched(run):
        repeat(t, bad.step)
    with ranks.unwatched():
        findings = ranks.gather(examine(t, t.loader.batches_of(bad.epoch, bad.step_of_epoch)))
    t.loader.close()
    if ranks.main:
        write_replay(run, report(t, bad, first, findings))
    log.info("replayed in %.1f s; the report is %s", time.perf_counter() - begun, run / REPORT_TEXT)


def repeat(t: Training, step: int) -> None:
    """Steps of the run, neither logged nor validated nor saved, until `step` have been taken."""
    clip_grad, p = t.cfg.task.clip_grad, t.progress
    if p.step == step:
        return
    for batch, last_of_step in device.sent(t.batches(), t.ranks.device):
        accumulate(t, batch, last_of_step)
        if last_of_step:
            t.schedule.set(t.optimizer, p.step / t.plan.steps_per_epoch)
            take_step(t, clip_grad, by_block=False)
            p.step += 1
            if p.step == step:
                return


def report(t: Training, bad: BadStep, first: int, findings: list[Finding]) -> str:
    """What a replay prints."""
    whence = f"the checkpoint of step {first}" if first else "the beginning"
    if bad.checkpoint is not None and bad.checkpoint != first:
        whence += f", since the checkpoint of step {bad.checkpoint} is gone"
    lines = [
        f"Step {bad.step + 1} (epoch {bad.step / t.plan.steps_per_epoch:.2f}), {len(bad.images)} images, repeated from "
        f"{whence}."
    ]
    for rank, finding in enumerate(findings):
        lines.append(f"Process {rank}: {origin(finding)}" if len(findings) > 1 else origin(finding))
        lines += [f"  {line}" for line in details(finding, t.loader.source.name)]
    if t.scaler.is_enabled():
        lines.append(f"The loss scale of fp16 was {t.scaler.get_scale():g}.")
    if bad.processes != len(findings):
        lines.append(f"The run had {bad.processes} processes, this replay {len(findings)}: sums round differently.")
    lines.append("What to try:")
    lines += [f"  {line}" for line in advice(findings, t.cfg, t.dtype)]
    return "\n".join(lines) + "\n"
