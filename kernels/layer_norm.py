"""add_layer_norm: x + residual, and the layer normalisation of that sum, in one launch each way; rows x channels. On
request the norm is in float8, for a product in that, and then without gradients.

A program holds whole rows in registers: x and residual are read once, sum and norm are written once, and mean and
variance come from the values at hand, in float32, in two passes over registers. The way back reads the sum and both
gradients once, and nothing else has to be kept for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks, reference
from kernels.float8_rows import as_float8_rows, empty_float8, to_float8
from kernels.launching import launch
from kernels.reference import Float8Rows


@triton.jit
def _centred(value, inside, channels, eps):
    """Differences to each row's mean, 0 outside, and the reciprocal standard deviations, (BLOCK_P, 1)."""
    difference = tl.where(inside, value - tl.sum(value, 1)[:, None] / channels, 0.0)
    # what rounding left of a mean far from 0
    difference = tl.where(inside, difference - tl.sum(difference, 1)[:, None] / channels, 0.0)
    return difference, tl.rsqrt(tl.sum(difference * difference, 1)[:, None] / channels + eps)


@triton.jit
def _add_layer_norm_kernel(
    x,
    residual,  # (rows, C), or None
    weight,
    bias,
    total,  # x + residual, or None
    out,
    scales,  # of out in float8, (rows,), or None
    rows,
    channels,
    eps,
    x_stride,  # of rows; channels lie side by side
    residual_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    exists = row < rows
    inside = exists & (c < channels)
    row = tl.cast(row, tl.int64)
    value = tl.load(x + row * x_stride + c, inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + c, inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * channels + c, rounded, inside)
        value = rounded.to(tl.float32)  # what the next layer reads is what is normalised
    difference, rstd = _centred(value, inside, channels, eps)
    w = tl.load(weight + c, c < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + c, c < channels, other=0.0).to(tl.float32)
    norm = difference * rstd * w + b
    if scales is not None:
        norm, scale = to_float8(tl.where(inside, norm, 0.0))
        tl.store(scales + row, scale, exists)
    tl.store(out + row * channels + c, norm.to(out.dtype.element_ty), inside)


@triton.jit
def _layer_norm_gradient_kernel(
    total,
    weight,
    grad_total,  # (rows, C), or None
    grad,  # of the norm
    grad_x,
    rows,
    channels,
    eps,
    total_stride,  # of rows; channels lie side by side
    grad_total_stride,
    grad_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (c < channels)
    row = tl.cast(row, tl.int64)
    value = tl.load(total + row * total_stride + c, inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + c, inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + c, c < channels, other=0.0).to(tl.float32)
    difference, rstd = _centred(value, inside, channels, eps)
    hat = difference * rstd
    mean_g = tl.sum(g, 1)[:, None] / channels
    mean_product = tl.sum(g * hat, 1)[:, None] / channels
    dx = rstd * (g - mean_g - hat * mean_product)
    if grad_total is not None:
        dx += tl.load(grad_total + row * grad_total_stride + c, inside, other=0.0).to(tl.float32)
    tl.store(grad_x + row * channels + c, dx.to(grad_x.dtype.element_ty), inside)


@launch.on_device
def add_layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, float8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum and norm, (rows, C) each, contiguous, and the norm's scales, (rows, 1); empty where there is none."""
    total, out, scales = _empty(x, residual, float8)
    rows, channels = x.shape
    sizes = launch.whole_rows(channels, 2 if float8 else x.itemsize)  # 16 values a thread: a vector of float8
    _add_layer_norm_kernel[(launch.cdiv(rows, sizes["BLOCK_P"]),)](
        x, residual, weight, bias, None if residual is None else total, out, scales if float8 else None,
        rows, channels, eps, x.stride(0), 0 if residual is None else residual.stride(0), **sizes,
    )  # fmt: skip
    return total, out, scales


@launch.on_device
def add_layer_norm_bwd(
    total: Tensor, weight: Tensor, grad_total: Tensor | None, grad: Tensor, eps: float
) -> Tensor:
    """Return the gradient of x and of residual, (rows, C), from the sum's own and the norm's."""
    grad, grad_total = launch.as_rows(grad), None if grad_total is None else launch.as_rows(grad_total)
    grad_x = total.new_empty(total.shape)
    rows, channels = total.shape
    sizes = launch.whole_rows(channels, total.itemsize)
    _layer_norm_gradient_kernel[(launch.cdiv(rows, sizes["BLOCK_P"]),)](
        total, weight, grad_total, grad, grad_x, rows, channels, eps, total.stride(0),
        0 if grad_total is None else grad_total.stride(0), grad.stride(0), **sizes,
    )  # fmt: skip
    return grad_x


def _empty(x: Tensor, residual: Tensor | None, float8: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape)
    if float8:
        return total, *empty_float8(x, x.shape[1])
    return total, x.new_empty(x.shape), x.new_empty(0, dtype=torch.float32)


add_layer_norm_op = torch.library.custom_op(
    "localcontrol::add_layer_norm", add_layer_norm_fwd, mutates_args=()
)


@add_layer_norm_op.register_fake
def _(x, residual, weight, bias, eps, float8):
    return _empty(x, residual, float8)


add_layer_norm_backward_op = torch.library.custom_op(
    "localcontrol::add_layer_norm_backward", add_layer_norm_bwd, mutates_args=()
)


@add_layer_norm_backward_op.register_fake
def _(total, weight, grad_total, grad, eps):
    return total.new_empty(total.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, _, ctx.eps, _ = inputs
    ctx.summed = residual is not None
    ctx.save_for_backward(output[0] if ctx.summed else x, weight)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # zeros for what nobody has used would be a launch each


def _backward(ctx, grad_total, grad, _):
    grad_x = grad_total if ctx.summed else None  # of no sum there is an empty one
    if grad is not None:
        grad_x = add_layer_norm_backward_op(*ctx.saved_tensors, grad_x, grad, ctx.eps)
    return grad_x, grad_x if ctx.summed else None, None, None, None, None


add_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    float8: bool = False,
) -> tuple[Tensor, Tensor | Float8Rows]:
    """`reference.add_layer_norm` in one launch. Gradients: x and residual, where the norm is not in float8."""
    checks.check_layer_norm(x, residual, weight, bias)
    if x.numel() == 0 or x.shape[-1] > launch.LONGEST_ROW:
        return reference.add_layer_norm(x, residual, weight, bias, eps, float8=float8)
    flat = launch.as_rows(x)
    others = None if residual is None else launch.as_rows(residual)
    args = flat, others, weight.contiguous(), bias.contiguous(), float(eps), float8
    total, out, scales = launch.call(add_layer_norm_fwd, add_layer_norm_op, *args)
    norm = as_float8_rows(out, scales, x.shape) if float8 else out.view(x.shape)
    return x if residual is None else total.view(x.shape), norm
