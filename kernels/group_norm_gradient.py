"""The gradient of group_norm_silu, two launches over the grid of the way there: sums of each group, then the image's.

Those of weight and bias come from the first launch, and only where they are asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.groups import (
    before_silu,
    chunk_start,
    grid_of,
    load_channels,
    load_partials,
    load_statistics,
    members,
    offset_mean,
    pick_sizes,
    rows_of_offset,
    spread_out,
    store_partials,
)
from kernels.launching import launch
from kernels.launching.tiles import tile_at, tile_inside


@triton.jit
def _gradient_sums_kernel(
    x,
    weight,
    bias,
    offset,
    statistics,
    grad,
    group_sums,  # (2, B, groups, chunks): sums of w g and of w g x_hat, g the gradient before the SiLU
    channel_sums,  # (2, B, chunks, C): sums of g and of g x_hat, or None
    pixels,
    channels,
    strides,
    offset_stride,
    grad_strides,
    chunk,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,  # tiles that are loaded before they are needed, this one included
):
    first, last, c = chunk_start(pixels, chunk, GROUP, GROUPS)
    end = c + GROUP * GROUPS
    b = tl.program_id(2)
    mean, rstd = load_statistics(statistics, c, channels, GROUP, GROUPS, BLOCK_C)
    mean = offset_mean(mean, offset, offset_stride, c, end, -1, BLOCK_C)
    w, shift = load_channels(weight, c, end, BLOCK_C), load_channels(bias, c, end, BLOCK_C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = sums
    for p in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        inside = tile_inside(p, c, last, end, BLOCK_P, BLOCK_C)
        value = tl.load(tile_at(x, strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        g = tl.load(tile_at(grad, grad_strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        hat = (value - mean) * rstd
        g = before_silu(g, hat * w + shift, SILU)  # 0 outside, as the gradient is
        sums += g
        products += g * hat
    total, product = tl.sum(sums, 0)[None, :], tl.sum(products, 0)[None, :]
    if channel_sums is not None:
        offsets = c + tl.arange(0, BLOCK_C)[None, :]
        rows = tl.num_programs(2) * tl.num_programs(0)
        row = channel_sums + (b * tl.num_programs(0) + tl.program_id(0)) * channels + offsets
        tl.store(row, total, offsets < end)
        tl.store(row + rows * channels, product, offsets < end)
    member = members(GROUP, GROUPS, BLOCK_C)
    of_group = tl.sum(tl.where(member, total * w, 0.0), 1)
    product_of_group = tl.sum(tl.where(member, product * w, 0.0), 1)
    store_partials(group_sums, of_group, product_of_group, c // GROUP, channels // GROUP, GROUPS)


@triton.jit
def _gradient_kernel(
    x,
    weight,
    bias,
    offset,
    statistics,
    grad,
    group_sums,
    grad_x,
    pixels,
    channels,
    strides,
    offset_stride,
    grad_strides,
    grad_x_strides,
    chunk,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    first, last, c = chunk_start(pixels, chunk, GROUP, GROUPS)
    end = c + GROUP * GROUPS
    b = tl.program_id(2)
    mean, rstd = load_statistics(statistics, c, channels, GROUP, GROUPS, BLOCK_C)
    mean = offset_mean(mean, offset, offset_stride, c, end, -1, BLOCK_C)
    w, shift = load_channels(weight, c, end, BLOCK_C), load_channels(bias, c, end, BLOCK_C)
    total, product = load_partials(group_sums, c // GROUP, channels // GROUP, GROUPS, CHUNKS)
    count = pixels * GROUP
    member = members(GROUP, GROUPS, BLOCK_C)
    mean_g = spread_out(tl.sum(total, 1) / count, member)
    mean_product = spread_out(tl.sum(product, 1) / count, member)
    for p in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        inside = tile_inside(p, c, last, end, BLOCK_P, BLOCK_C)
        value = tl.load(tile_at(x, strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        g = tl.load(tile_at(grad, grad_strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        hat = (value - mean) * rstd
        g = before_silu(g, hat * w + shift, SILU)
        dx = rstd * (w * g - mean_g - hat * mean_product)
        at = tile_at(grad_x, grad_x_strides, b, p, c, BLOCK_P, BLOCK_C)
        tl.store(at, dx.to(grad_x.dtype.element_ty), inside)


@launch.on_device
def group_norm_silu_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    silu: bool,
    with_parameters: bool,
    offset: Tensor | None = None,
    sizes: launch.Sizes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of x, weight and bias; the last two are empty unless asked for."""
    grad_x = launch.empty_pixels_like(x)
    x, strides = launch.as_pixels(x)
    grad, grad_strides = launch.as_pixels(grad)
    num_groups = statistics.shape[2]
    if sizes is None:
        call = grad, x, weight, bias, statistics, silu, with_parameters, offset
        sizes = pick_sizes(
            "group_norm_silu backward", x, strides, num_groups,
            lambda sizes: group_norm_silu_bwd(*call, sizes),
        )  # fmt: skip
    grid = grid_of(x, num_groups, sizes)
    group_sums = statistics.new_empty(*statistics.shape, grid[0])
    channel_sums = statistics.new_empty(2, x.shape[0] * grid[0], x.shape[1]) if with_parameters else None
    offset, offset_stride = rows_of_offset(offset)
    inputs = x, weight, bias, offset, statistics, grad, group_sums
    numbers = x.shape[2] * x.shape[3], x.shape[1], strides, offset_stride, grad_strides
    _gradient_sums_kernel[grid](*inputs, channel_sums, *numbers, SILU=silu, **sizes)
    _gradient_kernel[grid](
        *inputs, grad_x, *numbers, launch.as_pixels(grad_x)[1],
        SILU=silu, CHUNKS=launch.power_of_2(grid[0]), **sizes
    )  # fmt: skip
    if channel_sums is None:
        return grad_x, weight.new_empty(0), bias.new_empty(0)
    return grad_x, channel_sums[1].sum(0).to(weight.dtype), channel_sums[0].sum(0).to(bias.dtype)


def _group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    silu: bool,
    with_parameters: bool,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu_bwd(grad, x, weight, bias, statistics, silu, with_parameters, offset)


group_norm_silu_backward_op = torch.library.custom_op(
    "localcontrol::group_norm_silu_backward", _group_norm_silu_backward, mutates_args=()
)


@group_norm_silu_backward_op.register_fake
def _(grad, x, weight, bias, statistics, silu, with_parameters, offset=None):
    rows = weight.shape[0] if with_parameters else 0
    return launch.empty_pixels_like(x), weight.new_empty(rows), bias.new_empty(rows)
