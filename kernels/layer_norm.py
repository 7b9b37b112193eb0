"""add_layer_norm: x + residual, and the layer normalisation of that sum, in one launch; rows x channels. On request
the norm is in float8, for a product in that.

A program holds whole rows in registers: x and residual are read once, sum and norm are written once, and mean and
variance come from the values at hand, in float32, in two passes over registers.
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
    mean = tl.sum(value, 1)[:, None] / channels
    difference = tl.where(inside, value - mean, 0.0)
    # what rounding left of a mean far from 0
    difference = tl.where(inside, difference - tl.sum(difference, 1)[:, None] / channels, 0.0)
    rstd = tl.rsqrt(tl.sum(difference * difference, 1)[:, None] / channels + eps)
    w = tl.load(weight + c, c < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + c, c < channels, other=0.0).to(tl.float32)
    norm = difference * rstd * w + b
    if scales is not None:
        norm, scale = to_float8(tl.where(inside, norm, 0.0))
        tl.store(scales + row, scale, exists)
    tl.store(out + row * channels + c, norm.to(out.dtype.element_ty), inside)


@launch.on_device
def add_layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, float8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum and norm, (rows, C) each, contiguous, and the norm's scales, (rows, 1); empty where there is none."""
    total, out, scales = _empty(x, residual, float8)
    rows, channels = x.shape
    sizes = launch.whole_rows(channels, 2 if float8 else x.itemsize)  # 16 values a thread: a vector of float8
    _add_layer_norm_kernel[(triton.cdiv(rows, sizes["BLOCK_P"]),)](
        x, residual, weight, bias, None if residual is None else total, out, scales if float8 else None,
        rows, channels, eps, x.stride(0), 0 if residual is None else residual.stride(0), **sizes,
    )  # fmt: skip
    return total, out, scales


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


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    float8: bool = False,
) -> tuple[Tensor, Tensor | Float8Rows]:
    """`reference.add_layer_norm` as one kernel. No gradients."""
    checks.check_layer_norm(x, residual, weight, bias)
    if x.numel() == 0 or x.shape[-1] > launch.LONGEST_ROW:
        return reference.add_layer_norm(x, residual, weight, bias, eps, float8=float8)
    flat = launch.as_rows(x)
    others = None if residual is None else launch.as_rows(residual)
    args = flat, others, weight.contiguous(), bias.contiguous(), float(eps), float8
    total, out, scales = launch.call(add_layer_norm_fwd, add_layer_norm_op, *args)
    norm = as_float8_rows(out, scales, x.shape) if float8 else out.view(x.shape)
    return x if residual is None else total.view(x.shape), norm
