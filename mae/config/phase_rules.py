"""Contradictions in `task.img_size_schedule`, which lets images grow while a run trains."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from mae.config.values import pair

KEY = "task.img_size_schedule"


def img_size_schedule(cfg: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each contradiction."""
    task, schedule = cfg["task"], cfg["task"].get("img_size_schedule")
    if schedule is None:
        return
    if not schedule or not all(_is_phase(entry) for entry in schedule):
        yield (
            f"{KEY} must list [epoch, size] or [epoch, size, mask_ratio], each size one number or [height, width], got "
            f"{schedule}."
        )
        return
    if isinstance(task["mask_ratio"], list):
        yield (
            f"task.mask_ratio={task['mask_ratio']} draws a ratio for each batch, and {KEY} sets one for each epoch: "
            f"give one number, or set {KEY}=null."
        )
        return
    epochs = [entry[0] for entry in schedule]
    if epochs[0] or any(later <= epoch for epoch, later in pairwise(epochs)):
        yield f"{KEY} must begin with epoch 0 and its epochs must rise, got {epochs}."
    elif epochs[-1] >= task["epochs"]:
        yield (
            f"{KEY} changes the size at epoch {epochs[-1]}, and task.epochs={task['epochs']:g} ends the run before: "
            "raise task.epochs, or scale the schedule."
        )
    for _, size, *ratio in schedule:
        yield from _of_size(cfg, size, ratio[0] if ratio else task["mask_ratio"])


def _is_phase(entry: list[Any]) -> bool:
    """Whether an entry of the schedule is an epoch, a size, and perhaps a mask ratio."""
    if len(entry) not in (2, 3) or not isinstance(entry[0], int) or entry[0] < 0:
        return False
    size, ratio = entry[1], entry[2] if len(entry) == 3 else 0.5
    whole = isinstance(size, int) or isinstance(size, list) and len(size) == 2
    return whole and isinstance(ratio, int | float) and 0 < ratio < 1


def _of_size(cfg: Mapping[str, Any], size: int | list[int], mask_ratio: float) -> Iterator[str]:
    """What is wrong with images of a size at a mask ratio."""
    model, share = cfg["model"], cfg["task"]["predict_ratio"]
    patch, sides = pair(model["patch_size"]), pair(size)
    limits = zip(sides, patch, pair(model["img_size"]), strict=True)
    if any(side < unit or side % unit or side > largest for side, unit, largest in limits):
        yield (
            f"{KEY}: size {size} must be a multiple of model.patch_size={model['patch_size']}, and at most "
            f"model.img_size={model['img_size']}."
        )
        return
    patches = sides[0] // patch[0] * (sides[1] // patch[1])
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        yield (
            f"{KEY}: a mask ratio of {mask_ratio:g} keeps {visible} of the {patches} patches of size {size}: at least "
            "one must be kept and one masked."
        )
    if share is not None and share > mask_ratio:
        yield (
            f"task.predict_ratio={share:g} is above the mask ratio {mask_ratio:g} of size {size} in {KEY}: more "
            "patches than are masked."
        )
