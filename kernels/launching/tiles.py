"""Tiles of pixels x channels, which most kernels here work on: the same code for NCHW and NHWC."""

import triton
import triton.language as tl


@triton.jit
def tile_start(index, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """First pixel and first channel of the tile of that index."""
    columns = tl.cdiv(channels, BLOCK_C)
    return index // columns * BLOCK_P, index % columns * BLOCK_C


@triton.jit
def tile_inside(p, c, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which of the tile that starts at pixel p, channel c exists, (BLOCK_P, BLOCK_C)."""
    return (p + tl.arange(0, BLOCK_P) < pixels)[:, None] & (c + tl.arange(0, BLOCK_C) < channels)[None, :]


@triton.jit
def tile_at(pointer, strides, row, p, c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Addresses of that tile in a row of the batch; strides of rows, pixels and channels.

    The start is in int64, for tensors of more than 2^31 elements, the way from there in int32.
    """
    start = tl.cast(row, tl.int64) * strides[0] + tl.cast(p, tl.int64) * strides[1]
    start += tl.cast(c, tl.int64) * strides[2]
    tile = tl.arange(0, BLOCK_P)[:, None] * strides[1] + tl.arange(0, BLOCK_C)[None, :] * strides[2]
    return pointer + start + tile
