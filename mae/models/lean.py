"""The block's parts as autograd functions that keep less for backward than PyTorch's own, and copy less.

PyTorch keeps a layer norm's and a GELU's output because the next matrix product needs it, though either costs
next to nothing to compute again from its input, which is kept anyway: 5 of 16 values a token and channel.
The functions compute what the plain operations do, in the same order; under autocast they cast where it would.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear(norm(x))` that keeps `x` (..., D) alone."""
    if not torch.is_grad_enabled():
        return F.linear(norm(x), weight, bias)
    return _NormLinear.apply(x, norm.weight, norm.bias, weight, bias, norm.eps, product_dtype(x))


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear(gelu(x))` that keeps `x` (..., D) alone; exact GELU, as in the paper's code."""
    if not torch.is_grad_enabled():
        return F.linear(F.gelu(x), weight, bias)
    return _GeluLinear.apply(x, weight, bias, product_dtype(x))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by batched products: (B, M, H, d) over (B, N, H, d), gives (B, M, H, d)."""
    if torch.is_grad_enabled():
        return _PlainAttention.apply(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (weights.softmax(-1) @ v).transpose(1, 2)


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast, where it is on, has matrix products of `x` computed in."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, norm_weight, norm_bias, weight, bias, eps, dtype):
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        cast = weight.to(dtype)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, cast)
        ctx.eps = eps
        return F.linear(y.to(dtype), cast, bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        y = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, ctx.eps)[0].to(weight.dtype)
        grad_weight, grad_bias = _linear_grads(grad, y, norm_weight.dtype)
        del y
        grad_y = (grad @ weight).to(x.dtype)
        grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad_y, x, x.shape[-1:], mean, rstd, norm_weight, norm_bias, [ctx.needs_input_grad[0], True, True]
        )
        return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, dtype):
        cast = weight.to(dtype)
        ctx.save_for_backward(x, cast)
        ctx.param_dtype = weight.dtype
        return F.linear(F.gelu(x), cast, bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        x, weight = ctx.saved_tensors
        grad_weight, grad_bias = _linear_grads(grad, F.gelu(x), ctx.param_dtype)
        return torch.ops.aten.gelu_backward(grad @ weight, x), grad_weight, grad_bias, None


def _linear_grads(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of a linear map's weight and bias from those of its output (..., O) and its input (..., D)."""
    grad = grad.flatten(0, -2)
    return (grad.t() @ x.flatten(0, -2)).to(dtype), grad.sum(0).to(dtype)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v):
        shape, scale = q.shape, q.shape[-1] ** -0.5
        q, k, v = (_by_head(t) for t in (q, k, v))
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        weights = scores.softmax(-1)  # (B * H, M, N)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape, ctx.scale = shape, scale
        return _by_token(weights @ v, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        q, k, v, weights = ctx.saved_tensors
        (b, _, h, d), grad = ctx.shape, _by_head(grad)
        grad_v = weights.transpose(1, 2) @ grad
        grad_weights = grad @ v.transpose(1, 2)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        empty = q.new_empty(())
        grad_q = torch.baddbmm(empty, grad_scores, k, beta=0, alpha=ctx.scale)
        grad_k = torch.baddbmm(empty, grad_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        return tuple(_by_token(t, (b, t.shape[1], h, d)) for t in (grad_q, grad_k, grad_v))


def _by_head(x: Tensor) -> Tensor:
    """(B, N, H, d) to (B * H, N, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_token(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B * H, N, d) to `shape` (B, N, H, d)."""
    return x.unflatten(0, (shape[0], shape[2])).transpose(1, 2)
