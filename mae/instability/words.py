"""What a finding says to a reader, and what to try."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from mae.config.overrides import pasted
from mae.instability.watch import Finding
from mae.program import program
from mae.runs.bad_step import has_bad_step, read_bad_step

NAMED = 8  # images, parameters and blocks that a report lists
HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def origin(finding: Finding) -> str:
    """The first value that is not finite, in one sentence."""
    if finding.phase is None:
        return "Every value of the step is finite."
    if finding.phase == "images":
        return "The images themselves hold values that are not finite."
    if finding.phase == "norm":
        return "Every gradient is finite, but the norm over all of them overflows."
    weight = f" with the weight {finding.weight}" if finding.weight else ""
    module = finding.module or "the loss"
    return (
        f"The first value that is not finite arises in the {finding.phase} pass, in {module} (block {finding.block}), "
        f"as the result of {finding.operation}{weight}."
    )


def details(finding: Finding, name: Callable[[int], str]) -> Iterator[str]:
    """Further lines: weights, images and gradients that are not finite, and the largest activations."""
    if finding.weights:
        yield f"Weights that are not finite themselves: {_listed(finding.weights)}."
    if finding.images and finding.all_images:
        yield "It comes from all images."
    elif finding.images:
        yield f"It comes from {_listed([f'image {k} ({name(k)})' for k in sorted(set(finding.images))])}."
    if finding.gradients:
        yield (
            f"Gradients that are not finite: {len(finding.gradients)} of {finding.parameters}, from the output on: "
            f"{_listed(finding.gradients)}."
        )
    if finding.largest:
        largest = [f"{block} {size:.3g}" for block, size in finding.largest.items()]
        yield f"Largest magnitudes in the forward pass, by block: {', '.join(largest)}."


def advice(findings: Sequence[Finding], cfg: DictConfig, dtype: torch.dtype) -> list[str]:
    """What to try, the likeliest first."""
    phases = {finding.phase for finding in findings}
    if phases == {None}:
        return [
            "The step is finite this time. On a GPU sums may come in another order, and so may those of another number "
            "of processes; another device or other images change more. A value at the edge may then stay finite."
        ]
    if "images" in phases:
        return ["Mend these files, or take them out of the data. Lower rates and other formats do not help."]
    if any(finding.weights for finding in findings):
        return ["A weight is not finite: start again with init= of an earlier checkpoint, or from other weights."]
    lines = []
    if any(finding.images and not finding.all_images for finding in findings):
        lines.append("Look at the images named: a file with extreme values wants mending rather than a lower rate.")
    if dtype in HALF:
        other = "fp32 (or bf16, where the device has it)" if dtype is torch.float16 else "fp32"
        lines.append(f"task.precision={other}: {HALF[dtype]} {_limits(dtype)}.")
    if cfg.task.clip_grad is None:
        lines.append("task.clip_grad=1.0: one step's gradient then changes the weights less.")
    lines.append(f"A lower optimizer.base_lr than {cfg.optimizer.base_lr:g}, or a longer task.warmup_epochs.")
    return lines


def hint(run: Path) -> str:
    """Sentences on the bad step for a message that ends a run; empty where it has none."""
    if not has_bad_step(run):
        return ""
    bad = read_bad_step(run)
    block = f" The first value that is not finite arose in {bad.block}, at step {bad.step + 1}." if bad.block else ""
    return f"{block} `{program()} {pasted('replay', str(run))}` runs that step again and looks at every operation."


def _limits(dtype: torch.dtype) -> str:
    if dtype is torch.float16:
        return f"overflows above {torch.finfo(dtype).max:g}"
    return "keeps 8 bits of each number"


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
