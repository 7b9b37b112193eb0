"""What the kernels of `group_norm_silu` share: a program's place, its groups, and the merging of the chunks' sums."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from kernels.launching import launch, tuning


@triton.jit
def chunk_start(pixels, chunk, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """This program's first pixel, the one after its last, and its first channel."""
    first = tl.program_id(0) * chunk
    return first, tl.minimum(first + chunk, pixels), tl.program_id(1) * (GROUP * GROUPS)


@triton.jit
def members(GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which channel of the block belongs to which of its groups, (GROUPS, BLOCK_C)."""
    return tl.arange(0, BLOCK_C)[None, :] // GROUP == tl.arange(0, GROUPS)[:, None]


@triton.jit
def spread_out(of_groups, member):
    """(GROUPS,) -> (1, BLOCK_C): every channel's group's value."""
    return tl.sum(tl.where(member, of_groups[:, None], 0.0), 0)[None, :]


@triton.jit
def load_channels(pointer, c, end, BLOCK_C: tl.constexpr):
    offsets = c + tl.arange(0, BLOCK_C)[None, :]
    return tl.load(pointer + offsets, offsets < end, other=0.0).to(tl.float32)


@triton.jit
def offset_mean(mean, offset, stride, c, end, SIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean of the channels, (1, BLOCK_C), moved by this sample's offset, SIGN times, or as it is without one."""
    if offset is not None:
        mean += SIGN * load_channels(offset + tl.program_id(2) * stride, c, end, BLOCK_C)
    return mean


@triton.jit
def store_partials(partials, one, other, group, groups, GROUPS: tl.constexpr):
    """This chunk's two sums of each of its groups."""
    chunks = tl.num_programs(0)
    row = tl.program_id(2) * groups + group + tl.arange(0, GROUPS)
    at = partials + row * chunks + tl.program_id(0)
    tl.store(at, one)
    tl.store(at + tl.num_programs(2) * groups * chunks, other)


@triton.jit
def load_partials(partials, group, groups, GROUPS: tl.constexpr, CHUNKS: tl.constexpr):
    """All chunks' sums of this program's groups, (GROUPS, CHUNKS) each."""
    chunks = tl.num_programs(0)
    row = tl.program_id(2) * groups + group + tl.arange(0, GROUPS)
    number = tl.arange(0, CHUNKS)
    at = partials + row[:, None] * chunks + number[None, :]
    exists = (row >= 0)[:, None] & (number < chunks)[None, :]
    one = tl.load(at, exists, other=0.0)
    return one, tl.load(at + tl.num_programs(2) * groups * chunks, exists, other=0.0)


@triton.jit
def merge_statistics(
    partials,
    pixels,
    channels,
    chunk,
    eps,
    c,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Mean and reciprocal standard deviation of this program's groups, (GROUPS,)."""
    means, spreads = load_partials(partials, c // GROUP, channels // GROUP, GROUPS, CHUNKS)
    left = pixels - tl.arange(0, CHUNKS) * chunk
    counts = tl.minimum(tl.maximum(left, 0), chunk).to(tl.float32)[None, :]
    mean = tl.sum(means * counts, 1) / pixels
    off = means - mean[:, None]
    variance = tl.sum(spreads + counts * GROUP * off * off, 1) / (pixels * GROUP)
    return mean, 1 / tl.sqrt(variance + eps)


@triton.jit
def _statistics_at(statistics, c, channels, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Addresses of the means and of the reciprocal standard deviations of this program's groups."""
    groups = channels // GROUP
    at = statistics + tl.program_id(2) * groups + c // GROUP + tl.arange(0, GROUPS)
    return at, at + tl.num_programs(2) * groups


@triton.jit
def store_statistics(statistics, mean, rstd, c, channels, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    at, other = _statistics_at(statistics, c, channels, GROUP, GROUPS)
    tl.store(at, mean)
    tl.store(other, rstd)


@triton.jit
def load_statistics(
    statistics, c, channels, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and reciprocal standard deviation of every channel's group, (1, BLOCK_C)."""
    at, other = _statistics_at(statistics, c, channels, GROUP, GROUPS)
    member = members(GROUP, GROUPS, BLOCK_C)
    return spread_out(tl.load(at), member), spread_out(tl.load(other), member)


@triton.jit
def before_silu(g, y, SILU: tl.constexpr):
    """The gradient of y from that of silu(y)."""
    if SILU:
        s = tl.sigmoid(y)
        return g * s * (1 + y * (1 - s))
    else:
        return g


def rows_of_offset(offset: Tensor | None) -> tuple[Tensor | None, int]:
    """Return an offset with its channels side by side, and the stride of its rows, 0 for a single one."""
    if offset is None:
        return None, 0
    offset = launch.as_rows(offset)
    return offset, 0 if offset.shape[0] == 1 else offset.stride(0)


def grid_of(x: Tensor, num_groups: int, sizes: launch.Sizes) -> tuple[int, int, int]:
    """Return a program for each chunk of pixels, block of whole groups, and sample."""
    pixels = x.shape[2] * x.shape[3]
    return launch.cdiv(pixels, sizes["chunk"]), num_groups // sizes["GROUPS"], x.shape[0]


def pick_sizes(
    op: str, x: Tensor, strides: launch.Strides, num_groups: int, run: Callable[[launch.Sizes], object]
) -> launch.Sizes:
    """Return the tuned sizes of launches over x, or the heuristic's; see `tuning.pick`. Not to be changed."""
    batch, channels, height, width = x.shape
    shape = batch, height * width, channels, num_groups, launch.channels_inner(strides)
    return tuning.pick(op, (x.dtype, *shape), x.device, lambda: launch.group_blocks(*shape, x.itemsize), run)
