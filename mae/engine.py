"""The train loop. Everything it calls is one import away; a line belongs here only if it says what a step is."""

import contextlib
import logging
import math
import os
from pathlib import Path
from typing import Annotated

import torch
from omegaconf import DictConfig
from torch import Tensor

from mae import device, limits
from mae.config.build import call
from mae.config.saved import read_config
from mae.data.workers import naming_killed_workers
from mae.distributed.ranks import Ranks, start
from mae.distributed.rendezvous import lost_peer
from mae.distributed.signals import Interruption
from mae.errors import Diverged
from mae.instability.record import record_bad_step
from mae.instability.replay import replay
from mae.instability.words import hint
from mae.perf.compile import no_recompilation
from mae.perf.micro_batch import memory_advice
from mae.perf.profiling import profiled
from mae.progress import Clock
from mae.report.run import write_report
from mae.runs import attempt, environment
from mae.runs.failure import write_failure
from mae.runs.file_system import check_needs
from mae.runs.locks import held_run
from mae.runs.summary import Summary
from mae.step import accumulate, take_step
from mae.tasks import registry
from mae.tasks.base import training_summary
from mae.tracking import norms
from mae.tracking.base import Tracker
from mae.tracking.build import build_trackers
from mae.tracking.console import set_up_logging
from mae.training import Training, set_up

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop, has saved a checkpoint, and can go on from it."""


def train(
    t: Training,
    *,
    clip_grad: Annotated[float, "(0, inf)"] | None,
    log_every_steps: Annotated[int, "[1, inf)"],
    eval_every_epochs: Annotated[float, "(0, inf)"],
    max_bad_steps: Annotated[int, "[1, inf)"],
    profile: bool,
) -> dict[str, float]:
    """Trains to the end of the plan and returns the last validation's metrics.

    Raises Interrupted on a signal to any rank and Diverged after `max_bad_steps` bad steps, both with a
    checkpoint saved.
    """
    p, plan, ranks = t.progress, t.plan, t.ranks
    metrics: dict[str, float] = {}
    totals: dict[str, Tensor] = {}  # scalars of this step's micro-batches
    clock = Clock(p.step)
    profiling = profiled(t.run, ranks.main, ranks.device.type == "cuda", plan.steps - p.step, profile=profile)
    with Interruption() as interruption, ranks.watched(t.run), profiling as profiler:
        for batch, last_of_step in clock.timed(device.sent(t.batches(), ranks.device)):
            scalars = accumulate(t, batch, last_of_step)
            totals = {name: totals.get(name, 0.0) + value.detach() for name, value in scalars.items()}
            if not last_of_step:
                continue

            lr = t.schedule.set(t.optimizer, p.step / plan.steps_per_epoch)
            last = p.step + 1 == plan.steps
            logged = last or (p.step + 1) % log_every_steps == 0
            sizes = take_step(t, clip_grad, by_block=logged)
            t.statistics.after_step(p.bad_run)
            p.add(totals, t.scaler.is_enabled())
            totals = {}
            p.step += 1
            profiler.step()

            if logged:
                t.tracker.log(t.position() | {"lr": lr} | norms.numbers(sizes) | measure(t, clock))
            if last or plan.crosses(eval_every_epochs, p.step):
                metrics = t.evaluate()
                clock.restart(p.step)

            stop, late = ranks.agree(interruption.received is not None, ranks.main and t.saver.late())
            diverged = logged and int(p.bad_run) >= max_bad_steps
            if logged:
                record_bad_step(t, diverged)
            if last or late or stop or diverged or t.best_unsaved or plan.crosses(t.saver.every_epochs, p.step):
                p.seconds += clock.lap()
                t.save()
            if diverged or (stop and not last):
                t.saver.wait()
                if diverged:
                    raise Diverged(f"{int(p.bad_run)} steps in a row had a loss or gradient that is not finite.")
                raise Interrupted(f"Asked to stop at step {p.step}.")
    t.saver.wait()
    return metrics


def measure(t: Training, clock: Clock) -> dict[str, float]:
    """Figures since the last log point, over all ranks. The one place where the host waits for the device."""
    p = t.progress
    skipped = int(p.bad_steps) - p.skips_told
    counted = p.step - p.logged_at - skipped
    means = {name: t.ranks.sum(total.clone()) / t.ranks.world / (counted or math.nan) for name, total in p.sums.items()}
    for total in p.sums.values():
        total.zero_()
    p.logged_at = p.step
    if skipped:
        t.tracker.event(f"skipped {skipped} steps whose loss or gradient was not finite", p.step)
        p.skips_told += skipped
    images = t.plan.images_seen(p.step) - t.plan.images_seen(clock.step)
    seconds, waited = clock.restart(p.step)
    scale = {"amp_scale": t.scaler.get_scale()} if t.scaler.is_enabled() else {}
    return {
        **{name: float(mean) for name, mean in means.items()},
        "images_per_second": round(images / seconds, 1),
        "data_wait": round(waited / seconds, 4),
        "memory_mb": device.peak_memory(t.ranks.device) // 2**20,
        **norms.rates(t.optimizer),
        **scale,
    }


def run_training(run: Path, cfg: DictConfig, ranks: Ranks, tracker: Tracker) -> Summary:
    """A trained task from start to summary. Raises Diverged where the last validation's loss is not finite."""
    t = call(set_up, cfg.task, run, cfg, ranks, tracker)
    tracker.log(t.position() | {f"derived/{k}": v for k, v in t.plan.derived(t.schedule.peak).items()})
    with no_recompilation(t.task.trained):
        metrics = call(train, cfg.task, t) if t.progress.step < t.plan.steps else t.evaluate()
    t.loader.close()
    if not math.isfinite(metrics.get("val/loss", 0.0)):
        raise Diverged(f"val/loss is {metrics['val/loss']} after the last step.")
    if ranks.main:
        t.task.on_train_end(run, t.progress.step, tracker)
    return training_summary(cfg.task.name, t.plan, t.progress.seconds, t.task.summary(metrics))


def run_task(run: Path, cfg: DictConfig, ranks: Ranks, tracker: Tracker) -> Summary:
    """Any task from start to summary."""
    with naming_killed_workers(), device.explaining_memory(ranks.device, memory_advice(cfg, ranks.world)):
        if cfg.task.get("cached_features"):
            from mae.tasks.linprobe_cached import probe_features  # imports matplotlib, which other runs start without

            return call(probe_features, cfg.task, run, cfg, ranks, tracker)
        if registry.TASKS[cfg.task.name].trains:
            return run_training(run, cfg, ranks, tracker)
        return call(registry.load_task(cfg.task.name), cfg.task, run, cfg, ranks, tracker)


def work(run: Path) -> int:
    """One process of a run, from joining the others to the summary; returns the exit code.

    An error of this rank is logged and raised, so that whoever started it ends the other ranks.
    """
    cfg = read_config(run)
    rank = int(os.environ.get("RANK", 0))
    limits.raise_open_files()
    if "OMP_NUM_THREADS" not in os.environ and limits.cpus() < torch.get_num_threads():  # of a container's quota
        torch.set_num_threads(limits.cpus())
    with held_run(run) if rank == 0 else contextlib.nullcontext():
        return _work(run, cfg, rank)


def _work(run: Path, cfg: DictConfig, rank: int) -> int:
    """One process of a run that no other process writes into."""
    set_up_logging(run, rank)
    tracker, ranks = Tracker(), None
    code, summary = 1, None
    try:
        ranks = call(start, cfg.launcher, cfg.device)
        if ranks.main:
            for warning in check_needs(run):
                log.warning("%s", warning)
            environment.keep(run, *device.description(ranks.device), ranks.world)
            if cfg.replay is None:
                tracker = build_trackers(run, cfg)
        if cfg.replay is not None:
            with naming_killed_workers(), device.explaining_memory(ranks.device, memory_advice(cfg, ranks.world)):
                replay(run, cfg, ranks)
        else:
            summary = run_task(run, cfg, ranks, tracker)
        if ranks.main and summary is not None:
            attempt.check(run)
            summary.write(run)
        ranks.barrier()  # where torchrun started us, each rank looks for the summary itself
        code = 0
    except Interrupted as stopped:
        log.info("%s A checkpoint is saved; the same command goes on from it.", stopped)
        tracker.event("interrupted: a checkpoint is saved", None)
        code = 130
    except Diverged as stopped:
        advice = "Try a lower optimizer.base_lr, task.clip_grad=1.0, or fp32."
        log.error("%s A checkpoint is saved. %s%s", stopped, advice, hint(run))
        write_failure(run, rank, stopped)
        tracker.event(f"diverged: {stopped}", None)
        code = 3
    except Exception as error:
        write_failure(run, rank, error, lost_peer(error))
        tracker.event(f"failed: {error}", None)
        ranks = None  # the others may be anywhere: closing the group could block
        raise
    finally:
        tracker.finish(summary.to_json() if summary is not None else {}, failed=code != 0)
        if rank == 0 and cfg.replay is None:
            write_report(run)
        if ranks is not None:
            ranks.close()
    return code
