"""add_layer_norm: x + residual, and the layer normalisation of that sum, in one launch; rows x channels.

A program holds whole rows in registers: x and residual are read once, sum and norm are written once, and mean and
variance come from the values at hand, in float32, in two passes over registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks, reference
from kernels.launching import launch

LONGEST = 16384  # channels: a row must fit into the registers of one program


@triton.jit
def _add_layer_norm_kernel(
    x,
    residual,  # (rows, C), or None
    weight,
    bias,
    total,  # x + residual, or None
    out,
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
    inside = (row < rows) & (c < channels)
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
    tl.store(out + row * channels + c, (difference * rstd * w + b).to(out.dtype.element_ty), inside)


@launch.on_device
def add_layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return sum and norm, (rows, C) each, contiguous; the sum is empty without a residual."""
    rows, channels = x.shape
    out = x.new_empty(rows, channels)
    total = None if residual is None else x.new_empty(rows, channels)
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, 1024 // block_c)
    _add_layer_norm_kernel[(triton.cdiv(rows, block_r),)](
        x, residual, weight, bias, total, out, rows, channels, eps,
        x.stride(0), 0 if residual is None else residual.stride(0),
        BLOCK_P=block_r, BLOCK_C=block_c, num_warps=launch.warps(block_r * block_c, x.itemsize),
    )  # fmt: skip
    return x.new_empty(0) if total is None else total, out


add_layer_norm_op = torch.library.custom_op(
    "localcontrol::add_layer_norm", add_layer_norm_fwd, mutates_args=()
)


@add_layer_norm_op.register_fake
def _(x, residual, weight, bias, eps):
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return total, x.new_empty(x.shape)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`reference.add_layer_norm` as one kernel. No gradients."""
    checks.check_layer_norm(x, residual, weight, bias)
    if x.numel() == 0 or x.shape[-1] > LONGEST:
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    flat = _rows(x)
    others = None if residual is None else _rows(residual)
    args = flat, others, weight.contiguous(), bias.contiguous(), float(eps)
    total, out = launch.call(add_layer_norm_fwd, add_layer_norm_op, *args)
    return x if residual is None else total.view(x.shape), out.view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """Return (rows, C), channels side by side; a copy only where memory is not so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
