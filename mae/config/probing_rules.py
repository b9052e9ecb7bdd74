"""Contradictions in what a probe reads."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def probe_contradictions(cfg: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each key of a probe that the model or another key rules out."""
    task, width, depth = cfg["task"], cfg["model"]["embed_dim"], cfg["model"]["depth"]
    if task["name"] != "linprobe":
        return
    queries = task["probe_queries"]
    yield from _layer_contradictions(task["layer"], depth)
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


def probed_layers(layer: Sequence[int | None] | str | int | None, depth: int) -> list[int | None]:
    """The layers that `task.layer` names; `all` are those of every block."""
    if isinstance(layer, str):
        return list(range(depth))
    return [layer] if layer is None or isinstance(layer, int) else list(layer)


def _layer_contradictions(layer: list[int | None] | str | int | None, depth: int) -> Iterator[str]:
    layers = probed_layers(layer, depth)
    for each in layers:
        if each is not None and not -depth <= each < depth:
            yield (
                f"task.layer={each} is none of the {depth} blocks: {-depth} to {depth - 1}, or null for the output of "
                "the last norm."
            )
            return
    if not layers:
        yield "task.layer must name one layer or more, got []."
    blocks = [each if each is None else each % depth for each in layers]
    for number, block in enumerate(blocks):
        if block in blocks[:number]:
            text = ["null" if each is None else str(each) for each in layers]
            twice = " and ".join(text[k] for k, other in enumerate(blocks) if other == block)
            yield f"task.layer=[{','.join(text)}] names one layer twice ({twice}): remove one of them."
            return
