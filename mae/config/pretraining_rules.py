"""Contradictions in what pre-training masks, decodes and predicts."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mae.config.compose import CONF
from mae.config.phase_rules import img_size_schedule
from mae.config.schema import table
from mae.config.values import near, pair


def _masks(cfg: Mapping[str, Any]) -> Iterator[str]:
    known = sorted(path.stem for path in (CONF / "masking").glob("*.yaml"))
    for name in cfg["task"].get("masks", []):
        if name not in known:
            yield f"task.masks names {name}, which is none of {', '.join(known)}.{near(name, known)}"
    narrow, wide = (cfg["masking"].get(key) for key in ("sigma", "wide_sigma"))
    if narrow is not None and wide is not None and wide <= narrow:
        yield f"masking.wide_sigma={wide} must be greater than masking.sigma={narrow}."


def _decoder(cfg: Mapping[str, Any]) -> Iterator[str]:
    model, task = cfg["model"], cfg["task"]
    name, known = model["decoder"], list(table("models.decoders:DECODERS"))
    if name not in known:
        yield f"model.decoder={name} is none of {', '.join(known)}.{near(name, known)}"
    if name == "linear" and model["mask_tokens"] == "decoder":
        yield (
            "model.decoder=linear predicts from the encoder's tokens, of which masked patches have none: set "
            "model.mask_tokens=encoder."
        )
    if name == "cross" and model["mask_tokens"] == "encoder":
        yield (
            "model.mask_tokens=encoder puts masked patches among the tokens that model.decoder=cross attends to: set "
            "model.mask_tokens=decoder."
        )
    share, ratio = task.get("predict_ratio"), task.get("mask_ratio")
    if share is None:
        return
    if name == "self":
        yield (
            f"task.predict_ratio={share:g} leaves masked patches out, which model.decoder=self needs for those that it "
            "predicts: set task.predict_ratio=null, or model.decoder=cross."
        )
    if share > (min(ratio, default=1) if isinstance(ratio, list) else ratio):
        yield f"task.predict_ratio={share:g} is above task.mask_ratio={ratio}: more patches than are masked."


def _target(cfg: Mapping[str, Any]) -> Iterator[str]:
    target, task, patch = cfg["target"], cfg["task"], pair(cfg["model"]["patch_size"])
    name, cell = target["name"], target.get("cell")
    if task["name"] == "pretrain" and task["norm_pix_loss"] and name != "pixels":
        yield f"task.norm_pix_loss=true normalises pixels, which target={name} does not predict: leave it out."
    if cell is not None and any(side % cell for side in patch):
        yield (
            f"target.cell={cell} does not divide a patch of {patch[0]} x {patch[1]} pixels (model.patch_size): choose "
            "one that does, or leave it out."
        )
    values = patch[0] * patch[1] * cfg["model"]["in_chans"]
    if target.get("components", 0) > values:
        yield f"target.components={target['components']} is more than the {values} values of a patch: lower it."
    for key in ("file", "fitted"):
        path, reads = target.get(key), task["name"] == "pretrain" and not cfg["dry_run"]
        if path is not None and reads and not os.path.exists(os.path.expanduser(path)):
            yield f"target.{key}={path} does not exist."
    if task["name"] == "stats" and name not in ("pixels", "pca"):
        yield f"target={name} does nothing with task=stats, which fits target=pca alone: leave it out."
    if task["name"] == "stats" and target.get("fitted") is not None:
        yield "target.fitted is of pre-training: task=stats measures the patches anew. Leave it out."
    ratio = task.get("mask_ratio")
    if isinstance(ratio, list) and (len(ratio) != 2 or ratio[0] >= ratio[1]):
        yield f"task.mask_ratio must be a number or [low, high] with low < high, got {ratio}."


RULES: list[Callable[[Mapping[str, Any]], Iterator[str]]] = [_masks, _decoder, _target, img_size_schedule]
