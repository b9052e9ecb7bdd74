"""Leaves the first step of a run that is not finite in its directory, once it is seen at a log point."""

import logging

import torch

from mae import device
from mae.config.overrides import pasted
from mae.instability.watch import Finding, examine
from mae.instability.words import origin
from mae.program import program
from mae.runs.bad_step import BadStep, has_bad_step, save_start, write_bad_step
from mae.training import Training

log = logging.getLogger(__name__)


def record_bad_step(t: Training, diverged: bool) -> None:
    """Records the run's first bad step, unless there is none or it is recorded.

    The state before it is gone by now: steps after it have changed the weights. So the newest checkpoint up to it is
    saved from removal, from which `replay=RUN` repeats the steps. At once, the bad step's images are examined with the
    weights of this moment. All ranks must call, at a log point.

    fp16 raises its loss scale until gradients overflow. There a step counts whose loss is not finite, or where the run
    has `diverged`, the first of the last bad steps.
    """
    p = t.progress
    if p.bad_step_recorded or not int(p.bad_steps):
        return
    steps = [step for step in t.ranks.gather(int(p.first_bad)) if step >= 0]
    if not steps and diverged:
        steps = [p.step - int(p.bad_run)]
    if not steps:
        return
    p.bad_step_recorded = True
    if not t.ranks.gather(has_bad_step(t.run))[0]:  # left by an earlier attempt
        with t.ranks.unwatched():
            _record(t, min(steps))


def _record(t: Training, step: int) -> None:
    epoch, step_of_epoch = divmod(step, t.plan.steps_per_epoch)
    findings = t.ranks.gather(None if t.ranks.sharded else examine_now(t, epoch, step_of_epoch))
    block, sentences = None, []
    for rank, finding in enumerate(findings):
        process = f"Process {rank}: " if t.ranks.world > 1 else ""
        if finding is not None:
            block = block or finding.block
            sentences.append(f"{process}{origin(finding)}")
    if t.ranks.main:
        t.saver.wait()
        images = t.loader.sampler.step_indices(epoch, step_of_epoch).tolist()
        start = save_start(t.run, step)
        bad = BadStep(step, epoch, step_of_epoch, t.ranks.world, images, start, t.progress.step, block, sentences)
        write_bad_step(t.run, bad)
        seen = f" Its images with the weights of step {t.progress.step}: {' '.join(sentences)}" if sentences else ""
        again = f"`{program()} {pasted('replay', str(t.run))}` runs it again."
        t.tracker.event(f"step {step + 1} was the first that was not finite.{seen} {again}", t.progress.step)


def examine_now(t: Training, epoch: int, step_of_epoch: int) -> Finding | None:
    """What this rank's images of a step show with the weights of this moment; None where memory does not suffice."""
    alone = [module for module in t.task.modules() if hasattr(module, "alone")]
    for module in alone:  # a rank that fails here must not keep others waiting
        setattr(module, "alone", True)  # noqa: B010
    try:
        return examine(t, t.loader.batches_of(epoch, step_of_epoch))
    except Exception as error:
        if not device.out_of_memory(error):
            raise
        log.warning("the bad step could not be examined, for lack of memory")
        return None
    finally:
        for module in alone:
            setattr(module, "alone", False)  # noqa: B010
        if t.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
