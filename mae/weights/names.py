"""Which tensors of a checkpoint are the weights: containers and prefixes that wrappers left are searched, not listed.

A set of weights is recognised by its patch projection: what stands before `patch_embed.proj.weight` is its prefix. The
segments of torch's wrappers are taken out wherever they stand in a name, around the model or around single blocks.

Where a file holds several sets, the first by this order is read, and the report says which:
1. weights as they were trained (`model`, `state_dict`, ..., a name of the user's own),
2. a teacher, which self-distillation is evaluated by, 3. its student, 4. moving averages (`model_ema`, `ema`, ...).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mae.errors import UserError

State = dict[str, Tensor]  # a state dict
Content = Mapping[object, object]  # of a file of torch.save
WRAPPERS = {  # DistributedDataParallel and DataParallel, torch.compile, FSDP, activation checkpointing, Fabric
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
CONTAINERS = (
    "model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "backbone", "encoder",
)  # fmt: skip
AVERAGES = {"ema", "swa", "averaged", "average", "avg", "momentum", "target", "shadow", "polyak"}
PROJECTION = re.compile(r"^((?:.*\.)?)(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight$")
HUGGING_FACE = {"vit", "deit", "dinov2", "dinov2_with_registers", "beit", "vit_mae", "vit_msn", "yolos", "ijepa"}
DEPTH = 5  # of containers within containers


@dataclass(frozen=True)
class WeightSet:
    """One set of weights: the keys that lead to its dict, the prefix of its names, and its tensors without it."""

    keys: tuple[str, ...]
    prefix: str
    tensors: State

    @property
    def label(self) -> str:
        return ".".join((*self.keys, self.prefix.rstrip("."))).strip(".") or "the names without a prefix"

    @property
    def order(self) -> tuple[int, list[int]]:
        """The smallest is read."""
        path = [*self.keys, *filter(None, self.prefix.split("."))]
        words = {word for segment in path for word in segment.lower().split("_")}
        rank = 3 if words & AVERAGES else 2 if "student" in words else 1 if "teacher" in words else 0
        return rank, [CONTAINERS.index(name) if name in CONTAINERS else len(CONTAINERS) for name in path]


def select(content: Content, path: str | Path) -> tuple[WeightSet | None, list[str]]:
    """The set of weights in what a file holds, and sentences on what else it holds; None where none is recognised.

    Raises UserError where there are several that no rule puts in order.
    """
    choices: list[WeightSet] = []
    rest: dict[int, list[str]] = {}
    for keys, state in state_dicts(content):
        sets, others = _sets(keys, without_wrappers(state, path))
        choices += sets
        rest |= {id(choice): others for choice in sets}
    if not choices:
        return None, []
    choices.sort(key=lambda choice: choice.order)
    best = choices[0]
    equal = [choice.label for choice in choices if choice.order == best.order]
    if len(equal) > 1:
        raise UserError(
            f"init={path} holds {len(equal)} sets of weights, {' and '.join(equal)}, and nothing says which is meant: "
            "save that set on its own with torch.save."
        )
    notes = []
    if len(choices) > 1:
        unread = ", ".join(choice.label for choice in choices[1:])
        notes.append(f"Of the sets of weights in the file, {best.label} was read, not {unread}.")
    if left := rest[id(best)]:
        families = ", ".join(dict.fromkeys(_family(name, best.prefix) for name in left))
        notes.append(f"Only names that begin with {best.prefix} were read, not {families}.")
    return best, notes


def state_dicts(content: Content) -> Iterator[tuple[tuple[str, ...], State]]:
    """(keys that lead to it, tensors by name) of every dict of tensors in a file, each once."""
    seen: set[int] = set()

    def walk(value: Content, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], State]]:
        if id(value) in seen or len(keys) > DEPTH:
            return
        seen.add(id(value))
        tensors = {name: _tensor(item) for name, item in value.items() if isinstance(name, str)}
        if state := {name: tensor for name, tensor in tensors.items() if tensor is not None}:
            yield keys, state
        for name, item in value.items():
            if isinstance(item, Mapping) and isinstance(name, str):
                yield from walk(item, (*keys, name))

    return walk(content, ())


def without_wrappers(state: State, path: str | Path) -> State:
    """Tensors under their names without the segments of wrappers, and without `n_averaged` of an AveragedModel."""
    origin: dict[str, str] = {}
    for name in state:
        segments = [segment for segment in name.split(".") if segment not in WRAPPERS]
        if segments and segments[-1] != "n_averaged":
            short = ".".join(segments)
            if short in origin:
                raise UserError(
                    f"init={path} holds {short} twice, as {origin[short]} and as {name}: save the set of weights that "
                    "is meant on its own with torch.save."
                )
            origin[short] = name
    return {short: state[name] for short, name in origin.items()}


def _sets(keys: tuple[str, ...], state: State) -> tuple[list[WeightSet], list[str]]:
    """The sets of weights in one dict, and the names that belong to none."""
    prefixes = {_root(match[1], match[2], state) for name in state if (match := PROJECTION.match(name))}
    owner = {
        name: max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None) for name in state
    }
    sets = [
        WeightSet(keys, prefix, {n.removeprefix(prefix): t for n, t in state.items() if owner[n] == prefix})
        for prefix in sorted(prefixes)
    ]
    return sets, [name for name in state if owner[name] is None]


def _root(prefix: str, projection: str, state: State) -> str:
    """The prefix of a model's names: `prefix`, less its last segment where that is part of the names."""
    head, _, last = prefix.rstrip(".").rpartition(".")
    outer = f"{head}." if head else ""
    hugging_face = projection.startswith("embeddings.") and last in HUGGING_FACE
    mae_pytorch = last == "encoder" and (
        f"{outer}encoder_to_decoder.weight" in state
        or not any(name.startswith((f"{prefix}blocks.", f"{prefix}pos_embed")) for name in state)
    )
    return outer if hugging_face or mae_pytorch else prefix


def _family(name: str, prefix: str) -> str:
    """A name that was left out, up to the first segment that differs from `prefix`."""
    segments, own = name.split("."), prefix.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(segments, own, strict=False)) if a != b), 0)
    return ".".join(segments[: shared + 1]) + (".*" if len(segments) > shared + 1 else "")


def _tensor(item: object) -> Tensor | None:
    """A tensor, or an array of numbers as a tensor; None for anything else."""
    if isinstance(item, np.ndarray) and item.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(item))
    return item.detach() if isinstance(item, Tensor) else None
