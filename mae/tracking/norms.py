"""Norms of gradients and weights of each block, for the log points. Only `numbers` waits for the device."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def block_name(name: str) -> str:
    """The block of a model that a parameter belongs to: `blocks.3`, `decoder_blocks.0`, or its first name."""
    match = re.match(r"(?:decoder_)?blocks\.\d+", name)
    return match[0] if match else name.split(".")[0]


def by_block(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """Trained parameters by block."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            blocks.setdefault(block_name(name), []).append(parameter)
    return blocks


@torch.no_grad()
def norms(model: nn.Module) -> dict[str, Tensor]:
    """`grad_norm/BLOCK` and `weight_norm/BLOCK`, each (), of the parameters that have a gradient at this moment."""
    values: dict[str, Tensor] = {}
    for name, parameters in by_block(model.named_parameters()).items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            values[f"grad_norm/{name}"] = nn.utils.get_total_norm(gradients)
            values[f"weight_norm/{name}"] = nn.utils.get_total_norm(parameters)
    return values


def numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The values on the host, in one transfer."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`lr/layer_N` of each layer, where they differ."""
    by_layer = {group["layer"]: group["lr"] for group in optimizer.param_groups}
    return {f"lr/layer_{k:02d}": by_layer[k] for k in sorted(by_layer)} if len(by_layer) > 1 else {}
