"""float8_rows: each row in float8 e4m3, scaled to that format's range, and its scale; one launch, one reading."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks, reference
from kernels.launching import launch
from kernels.reference import Float8Rows

LARGEST = tl.constexpr(reference.FLOAT8_LARGEST)
SMALLEST = tl.constexpr(reference.FLOAT8_SMALLEST)


@triton.jit
def to_float8(value):
    """Rows of a program, (P, C) float32 with zeros where there are none: in float8, and their scales, (P, 1)."""
    largest = tl.maximum(tl.max(tl.abs(value), 1), SMALLEST)[:, None]
    scale = tl.div_rn(largest, tl.zeros_like(largest) + LARGEST)  # the kernels' own / is rounded otherwise
    return tl.div_rn(value, scale + tl.zeros_like(value)).to(tl.float8e4nv), scale


@triton.jit
def _float8_rows_kernel(
    x,
    values,
    scales,  # (rows,)
    rows,
    channels,
    x_stride,  # of rows; channels lie side by side
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    exists = row < rows
    inside = exists & (c < channels)
    at = tl.cast(row, tl.int64)
    value, scale = to_float8(tl.load(x + at * x_stride + c, inside, other=0.0).to(tl.float32))
    tl.store(values + at * channels + c, value, inside)
    tl.store(scales + row, scale, exists)


@launch.on_device
def float8_rows_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows, C) in float8, contiguous, and the scales, (rows, 1) float32."""
    rows, channels = x.shape
    values, scales = empty_float8(x, channels)
    sizes = launch.whole_rows(channels, x.itemsize)
    _float8_rows_kernel[(launch.cdiv(rows, sizes["BLOCK_P"]),)](
        x, values, scales, rows, channels, x.stride(0), **sizes
    )
    return values, scales


def empty_float8(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return memory for values and scales of as many rows as x has."""
    values = x.new_empty(x.shape[0], channels, dtype=reference.FLOAT8)
    return values, x.new_empty(x.shape[0], 1, dtype=torch.float32)


def as_float8_rows(values: Tensor, scales: Tensor, shape: Sequence[int]) -> Float8Rows:
    """Return rows that lie one after the other in the shape (..., C)."""
    return Float8Rows(values.view(shape), scales.view(*shape[:-1], 1))


float8_rows_op = torch.library.custom_op("localcontrol::float8_rows", float8_rows_fwd, mutates_args=())


@float8_rows_op.register_fake
def _(x):
    return empty_float8(x, x.shape[1])


def float8_rows(x: Tensor) -> Float8Rows:
    """`reference.float8_rows` as one kernel. No gradients."""
    checks.check_float8_rows(x)
    if x.numel() == 0 or x.shape[-1] > launch.LONGEST_ROW:
        return reference.float8_rows(x)
    return as_float8_rows(*launch.call(float8_rows_fwd, float8_rows_op, launch.as_rows(x)), x.shape)
