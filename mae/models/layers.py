"""Layers that every model shares: the transformer block, attention, DropPath."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention  # pyright: ignore[reportPrivateImportUsage]
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mae.errors import UserError
from mae.models.recompute import gelu_linear, norm_linear, plain_attention, product_dtype

Kernel = Literal["plain", "fused", "flash", "cudnn", "efficient", "math"]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_GPU_ONLY = ("cudnn", "efficient")
Checkpointing = Literal["none", "light", "blocks"]
LAYER_NORM_EPS = 1e-6  # everywhere in the paper's models; PyTorch's own default is 1e-5
LayerNorm: type[nn.LayerNorm] = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)  # type: ignore[assignment]


def attention_kernel(q: Tensor) -> Kernel:
    """The faster kernel for queries of this device and dtype.

    Off the CPU it is PyTorch's fused attention, which chooses a backend itself: cuDNN's on Hopper, else flash. On the
    CPU that has no fast path for half precision: plain batched products win by 2 to 5 times forward and backward.
    `task.attention_kernel` overrides it.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return "plain"
    return "fused"


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel | None = None) -> Tensor:
    """Softmax attention of queries (B, M, H, d) over keys and values (B, N, H, d), gives (B, M, H, d).

    `kernel` overrides `attention_kernel`'s choice. All kernels compute the same function.
    """
    kernel = kernel or attention_kernel(q)
    if kernel == "plain":
        return plain_attention(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else nullcontext():
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_backend(model: nn.Module, device: torch.device, tokens: int) -> str:
    """The name of what computes attention in `model` for `tokens` tokens, within autocast as in training."""
    block = blocks_of(model)[0]
    assert isinstance(block, Block)
    heads = block.attn.num_heads
    dtype = product_dtype(torch.empty(0, device=device, dtype=block.norm1.weight.dtype))
    q = torch.empty(1, tokens, heads, block.norm1.weight.numel() // heads, device=device, dtype=dtype)
    kernel = block.kernel or attention_kernel(q)
    if kernel != "fused":
        return kernel
    q = q.transpose(1, 2).requires_grad_()
    chosen = SDPBackend(torch.ops.aten._fused_sdp_choice(q, q, q))
    return next((name for name, backend in BACKENDS.items() if backend == chosen), chosen.name)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a sample's branch is dropped with probability `rate`, else
    scaled up. The rate is a tensor, which timm's is not: compiled blocks of all rates are then one graph."""

    keep: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.drop_prob = rate
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def random_samples(self, x: Tensor) -> Tensor:
        """Ones for the samples of `x` (B, ...) whose branch is computed, zeros for the others: (B, 1, ...)."""
        return torch.bernoulli(self.keep.expand(x.shape[0], *[1] * (x.ndim - 1)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (self.random_samples(x) / self.keep).to(x.dtype)


def residual(x: Tensor, branch: Callable[[Tensor], Tensor], drop: nn.Module, first: int = 0) -> Tensor:
    """`x[:, first:] + drop(branch(x))`; on a CPU a dropped branch is not computed.

    Elsewhere the host would wait for the device to learn which samples those are. A compiler would meet new shapes in
    each step, and fake tensors have no values.
    """
    host = x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()
    if not (host and isinstance(drop, DropPath) and drop.training):
        return x[:, first:] + drop(branch(x))
    samples, scale = drop.random_samples(x).flatten().nonzero().squeeze(1), 1 / float(drop.keep)
    if len(samples) == len(x):
        return torch.add(x[:, first:], branch(x), alpha=scale)
    return x[:, first:].index_add(0, samples, branch(x.index_select(0, samples)).to(x.dtype), alpha=scale)


class BlockBase(nn.Module):
    """What all blocks share: how they compute, and an MLP of `norm2` and `mlp.fc1`, `mlp.fc2`."""

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    mlp: nn.Module
    kernel: Kernel | None = None  # None: `attention_kernel` chooses
    checkpointing: Checkpointing = "light"  # what backward computes again, see `set_checkpointing`
    stream: torch.dtype | None = None  # of the residual stream within autocast, see `set_residual_dtype`
    ends_stream = False  # the last block of a stack returns float32

    def _mlp(self, x: Tensor) -> Tensor:
        first, second = self.mlp.fc1, self.mlp.fc2
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        recompute = self.checkpointing != "none"
        hidden = norm_linear(x, self.norm2, first.weight, first.bias, recompute)
        return gelu_linear(hidden, second.weight, second.bias, recompute)


class Block(BlockBase, TimmBlock):
    """timm's transformer block (same arguments and state dict) with our attention, and queries of some tokens only."""

    attn: Attention

    def __init__(self, *args: Any, drop_path: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if drop_path:
            self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, D) to (B, N - first, D): all are keys and values, those from `first` on are queries."""
        if self.checkpointing == "blocks" and torch.is_grad_enabled():
            return checkpoint(self._forward, x, first, use_reentrant=False)
        return self._forward(x, first)

    def _forward(self, x: Tensor, first: int) -> Tensor:
        half = self.stream is not None and torch.is_autocast_enabled(x.device.type)
        if half:
            x = x.to(self.stream)
        x = residual(x, lambda x: self.ls1(self._attend(x, first)), self.drop_path1, first)
        x = residual(x, lambda x: self.ls2(self._mlp(x)), self.drop_path2)
        return x.float() if half and self.ends_stream else x

    def _attend(self, x: Tensor, first: int) -> Tensor:
        attn, recompute = self.attn, self.checkpointing != "none"
        weight, bias, dim = attn.qkv.weight, attn.qkv.bias, x.shape[-1]
        if first:
            q = norm_linear(x[:, first:], self.norm1, weight[:dim], bias[:dim], recompute)
            k, v = norm_linear(x, self.norm1, weight[dim:], bias[dim:], recompute).chunk(2, -1)
        else:
            q, k, v = norm_linear(x, self.norm1, weight, bias, recompute).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (attn.num_heads, -1)) for t in (q, k, v))
        return attn.proj(attention(q, k, v, self.kernel).flatten(2))


def transformer_block(dim: int, num_heads: int, mlp_ratio: float) -> Block:
    """A block of the paper's encoder and decoder."""
    return Block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)


def block_sizes(block: nn.Module) -> tuple[int, int]:
    """(number of attention heads, width of the MLP) of a block, ours or timm's."""
    hidden = block.get_submodule("mlp.fc1")
    assert isinstance(block.attn, Attention) and isinstance(hidden, nn.Linear)
    return block.attn.num_heads, hidden.out_features


def blocks_of(model: nn.Module) -> list[BlockBase]:
    """The transformer blocks of a model, in the order of its modules: an encoder's come first."""
    return [module for module in model.modules() if isinstance(module, BlockBase)]


def set_layer_norm_eps(model: nn.Module, eps: float) -> None:
    """Sets the eps of every LayerNorm of `model`."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def set_attention_kernel(model: nn.Module, kernel: Kernel | Literal["auto"]) -> None:
    """Makes every block of `model` use `kernel`, whatever its inputs; `auto`: `attention_kernel` chooses again."""
    for block in blocks_of(model):
        block.kernel = None if kernel == "auto" else kernel


def set_checkpointing(model: nn.Module, checkpointing: Checkpointing) -> None:
    """Sets what the backward pass of every block computes again, rather than keep it from the forward pass.

    `none`: nothing, as PyTorch does by itself; `light`: LayerNorms and GELUs, which cost next to nothing (see
    `mae.models.recompute`); `blocks`: all but a block's input: a third more computation, a fraction of the memory.
    """
    for block in blocks_of(model):
        block.checkpointing = checkpointing


def set_residual_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Sets what the blocks of `model` store their sums in within autocast; None: as its products and sums come.

    Norms are computed in float32 all the same, and each stack of blocks returns float32.
    """
    for stack in model.modules():
        blocks = blocks_in(stack)
        for block in blocks:
            block.stream, block.ends_stream = dtype, block is blocks[-1]


def blocks_in(stack: nn.Module) -> list[Block]:
    """The blocks that a list or sequence of modules consists of, in order; none of any other module."""
    children = stack if isinstance(stack, nn.ModuleList | nn.Sequential) else ()
    return [child for child in children if isinstance(child, Block)]


def patch_grid(
    img_size: int | list[int], patch_size: int | list[int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(height, width) of an image, of a patch, and of the grid of patches. Raises UserError where none results."""
    img, patch = (_pair(size, key) for size, key in ((img_size, "img_size"), (patch_size, "patch_size")))
    if img[0] % patch[0] or img[1] % patch[1]:
        raise UserError(
            f"model.patch_size {patch[0]} x {patch[1]} does not divide model.img_size {img[0]} x {img[1]}. "
            "Choose a patch size that does."
        )
    return img, patch, (img[0] // patch[0], img[1] // patch[1])


def _pair(value: int | list[int], key: str) -> tuple[int, int]:
    """(height, width) from one number for both or [height, width]."""
    sizes = (value, value) if isinstance(value, int) else tuple(value)
    if len(sizes) != 2 or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise UserError(f"model.{key} must be a positive whole number or [height, width], got {value}.")
    return sizes[0], sizes[1]


def check_heads(prefix: str, width: int, num_heads: int) -> None:
    """Raises UserError where the heads of an encoder (`prefix` "") or decoder ("decoder_") do not divide its width."""
    if num_heads < 1 or width % num_heads:
        raise UserError(f"model.{prefix}num_heads {num_heads} does not divide model.{prefix}embed_dim {width}.")


class RunningStatistics:
    """Those of a model's batch norms. A forward pass adds to them, and a skipped step takes that back."""

    NAMES = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, model: nn.Module):
        buffers = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in self.NAMES]
        self.pairs = [(buffer, buffer.clone()) for buffer in buffers]  # current, and those after the last step

    @torch.no_grad()
    def after_step(self, skipped: Tensor) -> None:
        """`skipped` () on the device is above 0 where the step was skipped."""
        for current, last in self.pairs:
            current.copy_(torch.where(skipped > 0, last, current))
            last.copy_(current)
