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

from kernels import checks, reference
from kernels.group_norm_gradient import group_norm_silu_backward_op
from kernels.groups import (
    chunk_start,
    grid_of,
    load_channels,
    members,
    merge_statistics,
    offset_mean,
    pick_sizes,
    rows_of_offset,
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
    strides,
    offset_stride,  # of its rows, 0 for one
    chunk,  # pixels of a program
    GROUP: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a program
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,  # tiles that are loaded before they are needed, this one included
):
    first, last, c = chunk_start(pixels, chunk, GROUP, GROUPS)
    end = c + GROUP * GROUPS
    b = tl.program_id(2)
    shift = tl.load(
        tile_at(x, strides, b, first, c, 1, BLOCK_C), tile_inside(first, c, last, end, 1, BLOCK_C), other=0.0
    ).to(tl.float32)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = sums
    for p in tl.range(first, last, BLOCK_P, num_stages=STAGES):
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
    eps,
    strides,
    offset_stride,
    out_strides,
    chunk,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,  # rounded up to a power of two
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
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
    for p in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        inside = tile_inside(p, c, last, end, BLOCK_P, BLOCK_C)
        value = tl.load(tile_at(x, strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
        y = (value - mean) * scale + shift
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(tile_at(out, out_strides, b, p, c, BLOCK_P, BLOCK_C), y.to(out.dtype.element_ty), inside)


@launch.on_device
def group_norm_silu_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    offset: Tensor | None = None,
    sizes: launch.Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output, and the statistics that the backward pass needs."""
    out = launch.empty_pixels_like(x)
    x, strides = launch.as_pixels(x)
    if sizes is None:
        sizes = pick_sizes(
            "group_norm_silu", x, strides, num_groups,
            lambda sizes: group_norm_silu_fwd(x, weight, bias, num_groups, eps, silu, offset, sizes),
        )  # fmt: skip
    grid, pixels, channels = grid_of(x, num_groups, sizes), x.shape[2] * x.shape[3], x.shape[1]
    partials = x.new_empty(2, x.shape[0], num_groups, grid[0], dtype=torch.float32)
    statistics = x.new_empty(2, x.shape[0], num_groups, dtype=torch.float32)
    chunks = launch.power_of_2(grid[0])
    offset, offset_stride = rows_of_offset(offset)
    _statistics_kernel[grid](x, offset, partials, pixels, channels, strides, offset_stride, **sizes)
    _normalize_kernel[grid](
        x, weight, bias, offset, partials, statistics, out, pixels, channels, eps, strides, offset_stride,
        launch.as_pixels(out)[1], SILU=silu, CHUNKS=chunks, **sizes
    )  # fmt: skip
    return out, statistics


def _group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return group_norm_silu_fwd(x, weight, bias, num_groups, eps, silu, offset)


group_norm_silu_op = torch.library.custom_op(
    "localcontrol::group_norm_silu", _group_norm_silu, mutates_args=()
)


@group_norm_silu_op.register_fake
def _(x, weight, bias, num_groups, eps, silu, offset=None):
    return launch.empty_pixels_like(x), x.new_empty(2, x.shape[0], num_groups, dtype=torch.float32)


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
        return reference.group_norm_silu(x, weight, bias, num_groups, eps, silu, offset=offset)
    args = x, weight.contiguous(), bias.contiguous(), num_groups, float(eps), bool(silu), offset
    return launch.call(_group_norm_silu, group_norm_silu_op, *args)[0]
