"""Operations of an image in pre-training, from a run's config alone. `mae.tools.cost` counts the same on the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from mae.config.saved import read_config
from mae.config.values import pair
from mae.report.members import Member
from mae.runs.layout import CONFIG

COLUMN = "GFLOPs"


def pretraining_flops(cfg: Mapping[str, Any]) -> int | None:
    """Matrix products of an image's forward pass, two operations a multiply-add; None of what has no formula here.

    That is another task, another decoder than `self`, another target than `pixels` and `pca`, and mask ratios from a
    range. Of images that grow it is that of `model.img_size`.
    """
    task, model, target = cfg["task"], cfg["model"], cfg["target"]
    ratio = task["mask_ratio"] if task["name"] == "pretrain" else None
    known = model["decoder"] == "self" and target["name"] in ("pixels", "pca")
    if not isinstance(ratio, int | float) or not known:
        return None
    (height, width), (down, across) = pair(model["img_size"]), pair(model["patch_size"])
    patches, values = height // down * (width // across), down * across * model["in_chans"]
    visible = int(patches * (1 - ratio))
    dim, inner = model["embed_dim"], model["decoder_embed_dim"]
    encoded = 1 + (patches if model["mask_tokens"] == "encoder" else visible)
    total = 2 * visible * values * dim + model["depth"] * _block(encoded, encoded, dim, model["mlp_ratio"])
    outputs, every, masked = target.get("components", values), 1 + patches, patches - visible
    total += 2 * encoded * dim * inner + (model["decoder_depth"] - 1) * _block(every, every, inner, model["mlp_ratio"])
    total += _block(masked, every, inner, model["mlp_ratio"]) + 2 * masked * inner * outputs
    if target["name"] == "pca":
        total += 2 * patches * values * outputs
    return total


def _block(queries: int, keys: int, width: int, mlp_ratio: float) -> int:
    """A transformer's block that computes `queries` of its `keys` tokens."""
    projections = 2 * (2 * queries + 2 * keys) * width * width
    return projections + 4 * queries * keys * width + 4 * queries * width * int(width * mlp_ratio)


def member_flops(members: Sequence[Member]) -> dict[str, int]:
    """Member -> the operations of an image in its pre-training, without those of which none are known."""
    configs = {member.name: _pretraining_config(member) for member in members}
    return {name: flops for name, cfg in configs.items() if (flops := pretraining_flops(cfg)) is not None}


def _pretraining_config(member: Member) -> Mapping[str, Any]:
    """The config of a member, or of the stage of a pipeline that pre-trains."""
    stage = member.path / "pretrain"
    return read_config(stage) if (stage / CONFIG).is_file() else member.cfg


def relative_flops(members: Sequence[Member]) -> dict[str, float]:
    """Member -> its operations over those of the cheapest; empty where all have as many."""
    counts = member_flops(members)
    if len(set(counts.values())) < 2:
        return {}
    return {name: count / min(counts.values()) for name, count in counts.items()}
