"""Sizes of gradients and weights block by block, for the log points. Nothing here waits for the device."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def block(name: str) -> str:
    """The part of a model that a parameter belongs to: `blocks.3`, `decoder_blocks.0`, or its first name."""
    match = re.match(r"(?:decoder_)?blocks\.\d+", name)
    return match[0] if match else name.split(".")[0]


def blocks_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """Trained parameters by block."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            found.setdefault(block(name), []).append(parameter)
    return found


@torch.no_grad()
def norms(model: nn.Module) -> dict[str, Tensor]:
    """`grad_norm/BLOCK` and `weight_norm/BLOCK`, each (), of the parameters that have a gradient at this moment."""
    found: dict[str, Tensor] = {}
    for name, parameters in blocks_of(model.named_parameters()).items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            found[f"grad_norm/{name}"] = nn.utils.get_total_norm(gradients)
            found[f"weight_norm/{name}"] = nn.utils.get_total_norm(parameters)
    return found


def numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The values on the host, in one transfer."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))


def rates(optimizer: Any) -> dict[str, float]:
    """`lr/layer_N` of each layer, where layers learn at different rates."""
    by_layer = {group["layer"]: group["lr"] for group in optimizer.param_groups}
    return {f"lr/layer_{k:02d}": by_layer[k] for k in sorted(by_layer)} if len(by_layer) > 1 else {}
