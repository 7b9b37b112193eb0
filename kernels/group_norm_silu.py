"""group_norm_silu: group normalisation and SiLU, in two launches each way.

A launch per direction gathers sums and one applies them, both over the same grid of (chunk of pixels, block of whole
groups, sample): at batch 1 too there are several programs for every multiprocessor, where a block per group would
leave most of the GPU idle. A group's channels are neighbours in NHWC, so a block of several groups is read in
16-byte vectors whatever the group's width (10 channels at SDXL's first level).

An `offset` of each sample's channels, a bias or a time projection, is added without a pass over the pixels: it moves
the means, and x less the moved mean is what is normalised.

Statistics in float32, of differences to a pixel of the chunk: sum(x^2) - sum(x)^2 / n would lose everything where the
mean is large. Chunks are merged by Chan's formula, in the order of their numbers: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.groups import (
    before_silu,
    chunk_start,
    load_channels,
    load_partials,
    load_statistics,
    members,
    merge_statistics,
    offset_mean,
    spread_out,
    store_partials,
    store_statistics,
)
from kernels.launching import launch
from kernels.launching.tiles import tile_at, tile_inside


@triton.jit
def _statistics_kernel(
    x,
    offset,  # (B or 1, C), added to every pixel, or None
    partials,  # (2, B, groups, chunks) float32: mean, and sum of squared differences to it
    pixels,
    channels,
    chunk,  # pixels of a program
    strides,
    offset_stride,  # of its rows, 0 for one
    GROUP: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a program
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first, last, c = chunk_start(pixels, chunk, GROUP, GROUPS)
    end = c + GROUP * GROUPS
    b = tl.program_id(2)
    shift = tl.load(
        tile_at(x, strides, b, first, c, 1, BLOCK_C), tile_inside(first, c, last, end, 1, BLOCK_C), other=0.0
    ).to(tl.float32)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = sums
    for p in range(first, last, BLOCK_P):
        inside = tile_inside(p, c, last, end, BLOCK_P, BLOCK_C)
        value = tl.load(tile_at(x, strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, value - shift, 0.0)
        sums += difference
        squares += difference * difference
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, 0)[None, :]
    channel_mean = offset_mean(shift + total / count, offset, offset_stride, c, end, 1, BLOCK_C)
    channel_spread = tl.sum(squares, 0)[None, :] - total * total / count
    member = members(GROUP, GROUPS, BLOCK_C)
    mean = tl.sum(tl.where(member, channel_mean, 0.0), 1) / GROUP
    off = tl.where(member, channel_mean - mean[:, None], 0.0)
    spread = tl.sum(tl.where(member, channel_spread, 0.0) + count * off * off, 1)
    store_partials(partials, mean, spread, c // GROUP, channels // GROUP, GROUPS)


@triton.jit
def _normalize_kernel(
    x,
    weight,
    bias,
    offset,
    partials,
    statistics,  # (2, B, groups) float32: mean and reciprocal standard deviation, for the backward pass
    out,
    pixels,
    channels,
    chunk,
    eps,
    strides,
    offset_stride,
    out_strides,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,  # rounded up to a power of two
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first, last, c = chunk_start(pixels, chunk, GROUP, GROUPS)
    end = c + GROUP * GROUPS
    b = tl.program_id(2)
    mean, rstd = merge_statistics(partials, pixels, channels, chunk, eps, c, GROUP, GROUPS, CHUNKS)
    if tl.program_id(0) == 0:
        store_statistics(statistics, mean, rstd, c, channels, GROUP, GROUPS)
    member = members(GROUP, GROUPS, BLOCK_C)
    mean, rstd = spread_out(mean, member), spread_out(rstd, member)
    mean = offset_mean(mean, offset, offset_stride, c, end, -1, BLOCK_C)
    w, shift = load_channels(weight, c, end, BLOCK_C), load_channels(bias, c, end, BLOCK_C)
    scale = rstd * w
    for p in range(first, last, BLOCK_P):
        inside = tile_inside(p, c, last, end, BLOCK_P, BLOCK_C)
        value = tl.load(tile_at(x, strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        y = (value - mean) * scale + shift
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(tile_at(out, out_strides, b, p, c, BLOCK_P, BLOCK_C), y.to(out.dtype.element_ty), inside)


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
    chunk,
    strides,
    offset_stride,
    grad_strides,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first, last, c = chunk_start(pixels, chunk, GROUP, GROUPS)
    end = c + GROUP * GROUPS
    b = tl.program_id(2)
    mean, rstd = load_statistics(statistics, c, channels, GROUP, GROUPS, BLOCK_C)
    mean = offset_mean(mean, offset, offset_stride, c, end, -1, BLOCK_C)
    w, shift = load_channels(weight, c, end, BLOCK_C), load_channels(bias, c, end, BLOCK_C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = sums
    for p in range(first, last, BLOCK_P):
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
    chunk,
    strides,
    offset_stride,
    grad_strides,
    grad_x_strides,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
    for p in range(first, last, BLOCK_P):
        inside = tile_inside(p, c, last, end, BLOCK_P, BLOCK_C)
        value = tl.load(tile_at(x, strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        g = tl.load(tile_at(grad, grad_strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        hat = (value - mean) * rstd
        g = before_silu(g, hat * w + shift, SILU)
        dx = rstd * (w * g - mean_g - hat * mean_product)
        at = tile_at(grad_x, grad_x_strides, b, p, c, BLOCK_P, BLOCK_C)
        tl.store(at, dx.to(grad_x.dtype.element_ty), inside)


@launch.on_device
def group_norm_silu_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output, and the statistics that the backward pass needs."""
    out = launch.empty_pixels_like(x)
    x, strides = launch.as_pixels(x)
    grid, sizes, numbers = _launch(x, strides, num_groups)
    partials = x.new_empty(2, x.shape[0], num_groups, grid[0], dtype=torch.float32)
    statistics = x.new_empty(2, x.shape[0], num_groups, dtype=torch.float32)
    chunks = launch.power_of_2(grid[0])
    offset, offset_stride = _rows(offset)
    _statistics_kernel[grid](x, offset, partials, *numbers, strides, offset_stride, **sizes)
    _normalize_kernel[grid](
        x, weight, bias, offset, partials, statistics, out, *numbers, eps, strides, offset_stride,
        launch.as_pixels(out)[1], SILU=silu, CHUNKS=chunks, **sizes
    )  # fmt: skip
    return out, statistics


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of x, weight and bias; the last two are empty unless asked for."""
    grad_x = launch.empty_pixels_like(x)
    x, strides = launch.as_pixels(x)
    grad, grad_strides = launch.as_pixels(grad)
    grid, sizes, numbers = _launch(x, strides, statistics.shape[2])
    sizes["SILU"] = silu
    group_sums = statistics.new_empty(*statistics.shape, grid[0])
    channel_sums = statistics.new_empty(2, x.shape[0] * grid[0], x.shape[1]) if with_parameters else None
    offset, offset_stride = _rows(offset)
    inputs = x, weight, bias, offset, statistics, grad, group_sums
    numbers = *numbers, strides, offset_stride, grad_strides
    _gradient_sums_kernel[grid](*inputs, channel_sums, *numbers, **sizes)
    _gradient_kernel[grid](
        *inputs, grad_x, *numbers, launch.as_pixels(grad_x)[1],
        CHUNKS=launch.power_of_2(grid[0]), **sizes
    )  # fmt: skip
    if channel_sums is None:
        return grad_x, weight.new_empty(0), bias.new_empty(0)
    return grad_x, channel_sums[1].sum(0).to(weight.dtype), channel_sums[0].sum(0).to(bias.dtype)


def _rows(offset: Tensor | None) -> tuple[Tensor | None, int]:
    """An offset with its channels side by side, and the stride of its rows, 0 for a single one."""
    if offset is None:
        return None, 0
    offset = launch.as_rows(offset)
    return offset, 0 if offset.shape[0] == 1 else offset.stride(0)


def _launch(x: Tensor, strides: launch.Strides, num_groups: int):
    """Grid, block sizes, and (pixels, channels, chunk)."""
    batch, channels, height, width = x.shape
    sizes, chunk = launch.group_blocks(batch, height * width, channels, num_groups, strides, x.itemsize)
    grid = launch.cdiv(height * width, chunk), num_groups // sizes["GROUPS"], batch
    return grid, sizes, (height * width, channels, chunk)


group_norm_silu_op = torch.library.custom_op(
    "localcontrol::group_norm_silu", group_norm_silu_fwd, mutates_args=()
)
group_norm_silu_backward_op = torch.library.custom_op(
    "localcontrol::group_norm_silu_backward", group_norm_silu_bwd, mutates_args=()
)


@group_norm_silu_op.register_fake
def _(x, weight, bias, num_groups, eps, silu, offset=None):
    return launch.empty_pixels_like(x), x.new_empty(2, x.shape[0], num_groups, dtype=torch.float32)


@group_norm_silu_backward_op.register_fake
def _(grad, x, weight, bias, statistics, silu, with_parameters, offset=None):
    rows = weight.shape[0] if with_parameters else 0
    return launch.empty_pixels_like(x), weight.new_empty(rows), bias.new_empty(rows)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, _, ctx.silu, offset = inputs
    ctx.save_for_backward(x, weight, bias, output[1], offset)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the statistics would be a launch


def _backward(ctx, grad, _):
    with_parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    *saved, offset = ctx.saved_tensors
    grads = group_norm_silu_backward_op(grad, *saved, ctx.silu, with_parameters, offset)
    return *(grads if with_parameters else (grads[0], None, None)), None, None, None, None


group_norm_silu_op.register_autograd(_backward, setup_context=_setup_context)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    *,
    offset: Tensor | None = None,
) -> Tensor:
    """`reference.group_norm_silu` in two launches. Gradients: x, weight and bias."""
    checks.check_group_norm(x, weight, bias, num_groups, offset)
    if x.numel() == 0:
        return launch.empty_pixels_like(x)
    args = x, weight.contiguous(), bias.contiguous(), num_groups, float(eps), bool(silu), offset
    return launch.call(group_norm_silu_fwd, group_norm_silu_op, *args)[0]
