"""Contradictions in what a probe reads."""

from collections.abc import Iterator, Mapping
from typing import Any


def probe_contradictions(cfg: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each key of a probe that the model or another key rules out."""
    task, width, depth = cfg["task"], cfg["model"]["embed_dim"], cfg["model"]["depth"]
    if task["name"] != "linprobe":
        return
    layer, queries = task["layer"], task["probe_queries"]
    if layer is not None and not -depth <= layer < depth:
        yield (
            f"task.layer={layer} is none of the {depth} blocks: {-depth} to {depth - 1}, or null for the output of the "
            "last norm."
        )
    if task["probe"] != "attentive":
        return
    if width % queries:
        divisors = [number for number in range(1, width + 1) if width % number == 0]
        nearest = [*[number for number in divisors if number < queries][-1:], *[n for n in divisors if n > queries][:1]]
        yield (
            f"task.probe_queries={queries} does not divide model.embed_dim={width}, of which each query pools its "
            f"share: the nearest that do: {' or '.join(map(str, nearest))}."
        )
    if task["global_pool"] == "avg":
        yield (
            "task.global_pool=avg is for task.probe=linear, and an attentive probe pools by its queries: set "
            "task.global_pool=token."
        )
