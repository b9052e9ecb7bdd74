"""Layers of a block as autograd functions that keep less for backward than PyTorch's own, and copy less.

PyTorch keeps the outputs of LayerNorm and GELU because the next matrix product needs them: 5 of 16 values a token and
channel. Here they are computed again from their inputs, which are kept anyway, at next to no cost.
The functions compute what the plain operations do, in the same order; under autocast they cast where it would.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor, recompute: bool = True) -> Tensor:
    """`linear(norm(x))` that keeps only `x` (..., D) for backward; without `recompute` as PyTorch does it.

    The norm is computed in the wider type of `x` and its weights: FSDP gathers weights in half precision, and a
    residual stream may be half.
    """
    wide = torch.promote_types(x.dtype, norm.weight.dtype)
    if not (recompute and _recomputes()):
        return F.linear(norm(x.to(wide)), weight, bias)
    norm_weight, norm_bias = norm.weight.to(wide), norm.bias.to(wide)
    return _NormLinear.apply(x, norm_weight, norm_bias, weight, bias, norm.eps, product_dtype(x))


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, recompute: bool = True) -> Tensor:
    """`linear(gelu(x))` that keeps only `x` (..., D) for backward; exact GELU, as in the paper's code."""
    if not (recompute and _recomputes()):
        return F.linear(F.gelu(x), weight, bias)
    return _GeluLinear.apply(x, weight, bias, product_dtype(x))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by batched products: (B, M, H, d) over (B, N, H, d), gives (B, M, H, d)."""
    if _recomputes():
        return _PlainAttention.apply(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (weights.softmax(-1) @ v).transpose(1, 2)


def _recomputes() -> bool:
    """Whether there is a backward pass whose recomputation no compiler plans."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` are computed in under the current autocast."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps, dtype):
        wide = x.to(norm_weight.dtype)
        y, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], norm_weight, norm_bias, eps)
        cast = weight.to(dtype)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, cast)
        ctx.eps, ctx.param_dtype = eps, weight.dtype
        return _linear(y.to(dtype), cast, bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        grad_weight = grad_bias = None
        wide = x.to(norm_weight.dtype)
        if ctx.needs_input_grad[3]:  # not where the block is frozen
            y = torch.native_layer_norm(wide, x.shape[-1:], norm_weight, norm_bias, ctx.eps)[0].to(weight.dtype)
            grad_weight, grad_bias = _linear_grads(grad, y, ctx.param_dtype)
            del y
        grad_y = (grad @ weight).to(wide.dtype)
        grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad_y, wide, x.shape[-1:], mean, rstd, norm_weight, norm_bias, [ctx.needs_input_grad[0], True, True]
        )
        grad_x = grad_x if grad_x is None else grad_x.to(x.dtype)
        return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        cast = weight.to(dtype)
        ctx.save_for_backward(x, cast)
        ctx.param_dtype = weight.dtype
        return _linear(F.gelu(x), cast, bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight, grad_bias = _linear_grads(grad, F.gelu(x), ctx.param_dtype)
        return torch.ops.aten.gelu_backward(grad @ weight, x), grad_weight, grad_bias, None


TILES = torch.cpu._is_amx_tile_supported()  # Intel's AMX: products so fast that adding a bias separately costs


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not TILES:
        # addmm would write the bias to the output first and read it back: 3 % of a whole step
        return (x.flatten(0, -2) @ weight.t()).add_(bias).unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


def _linear_grads(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of a linear map's weight and bias from those of its output (..., O) and its input (..., D)."""
    grad = grad.flatten(0, -2)
    return (grad.t() @ x.flatten(0, -2)).to(dtype), grad.sum(0).to(dtype)


class _PlainAttention(torch.autograd.Function):
    """Takes a few images of the batch at a time, so that their scores stay in the processor's cache."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, saved = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for images in _slices(q, k):
            weights = _products(_by_head(q[images]), _by_head(k[images]).mT, _scale(q)).softmax(-1)
            out[images] = _by_token(weights @ _by_head(v[images]), q.shape)
            saved.append(weights)  # (B' * H, M, N)
        ctx.save_for_backward(q, k, v, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *saved = ctx.saved_tensors
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for images, weights in zip(_slices(q, k), saved, strict=True):
            query, key, value, g = (_by_head(t[images]) for t in (q, k, v, grad))
            grad_scores = torch.ops.aten._softmax_backward_data(g @ value.mT, weights, -1, weights.dtype)
            grads[0][images] = _by_token(_products(grad_scores, key, _scale(q)), q.shape)
            grads[1][images] = _by_token(_products(grad_scores.mT, query, _scale(q)), q.shape)
            grads[2][images] = _by_token(weights.mT @ g, q.shape)
        return grads


SCORES_IN_CACHE = 3 * 2**20  # bytes; measured: best at one image a core, 16 heads of 197 x 197 in bf16


def _slices(q: Tensor, k: Tensor) -> list[slice]:
    """Slices of the batch whose scores fit a CPU's cache; the whole batch on other devices."""
    if q.device.type != "cpu":
        return [slice(None)]
    image = q.shape[1] * k.shape[1] * q.shape[2] * q.element_size()
    step = max(1, SCORES_IN_CACHE // image)
    return [slice(start, start + step) for start in range(0, q.shape[0], step)]


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * (a @ b)` of batches of matrices, in one go."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _by_head(x: Tensor) -> Tensor:
    """(B, N, H, d) to (B * H, N, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """(B * H, N, d) to (B, N, H, d), with the heads of `shape`."""
    return x.unflatten(0, (-1, shape[2])).transpose(1, 2)
