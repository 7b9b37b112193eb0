"""How every kernel is launched: strides, block sizes, tickets. The heuristics are here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
import triton.language as tl
from torch import Tensor

T = TypeVar("T")
VECTOR_BYTES = 16  # of one load or store instruction
Strides = tuple[int, int, int]  # of rows, pixels and channels, in elements
Sizes = dict[str, int]  # a kernel's block sizes and num_warps


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own, which kernels can call too, takes 1.5 us."""
    return -(-a // b)


def power_of_2(least: int) -> int:
    """Return the smallest power of 2 that is at least `least`, which is not negative."""
    return 1 << max(0, least - 1).bit_length()


def as_pixels(tensor: Tensor) -> tuple[Tensor, Strides]:
    """Return a (B, C, H, W) tensor as rows x pixels x channels: itself, and the strides; a single row has stride 0.

    A copy where H and W are not one dimension in memory, as in an image cut out of a larger one.
    """
    strides = _pixel_strides(tensor)
    if strides is None:
        tensor = tensor.contiguous()
        strides = _pixel_strides(tensor)
    return tensor, strides


@lru_cache(maxsize=1024)
def constant_strides(strides: Strides) -> tuple:
    """Return the strides with small ones as compile-time constants.

    Of an integer that 16 does not divide Triton assumes nothing: latents of 4 channels, innermost in memory, would be
    read one element at a time.
    """
    return tuple(tl.constexpr(stride) if 1 < stride < VECTOR_BYTES else stride for stride in strides)


def is_pixels(tensor: Tensor) -> bool:
    """Return whether `as_pixels` copies nothing."""
    return _pixel_strides(tensor) is not None


def empty_pixels_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory for a result: in the tensor's memory format where that is pixels, otherwise contiguous."""
    out = torch.empty_like(tensor)
    return out if is_pixels(out) else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _pixel_strides(tensor: Tensor) -> Strides | None:
    batch, _, height, width = tensor.shape
    row, channel, vertical, horizontal = tensor.stride()
    if width == 1:
        horizontal = vertical
    elif height > 1 and vertical != width * horizontal:
        return None
    return (0 if batch == 1 else row), horizontal, channel


def channels_inner(strides: Strides) -> bool:
    """Return whether neighbouring addresses are channels (NHWC) and not pixels (NCHW)."""
    return strides[2] <= strides[1]


def tile(pixels: int, channels: int, strides: Strides, itemsize: int, elements: int = 2048) -> Sizes:
    """BLOCK_P x BLOCK_C of about `elements` elements, long where neighbours in memory are."""
    return dict(_tile(pixels, channels, channels_inner(strides), itemsize, elements))


@lru_cache(maxsize=1024)
def _tile(pixels: int, channels: int, inner: bool, itemsize: int, elements: int) -> Sizes:
    if inner:
        longest = 64 if channels % 64 == 0 else 256  # SDXL's widths are multiples of 64: no lane is idle
        block_c = min(power_of_2(channels), longest)
        block_p = _fill(elements, block_c, pixels)
    else:
        block_p = min(power_of_2(pixels), 512)
        block_c = _fill(elements, block_p, channels)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps(block_p * block_c, itemsize)}


def _fill(elements: int, inner: int, outer: int) -> int:
    return max(1, min(elements // inner, power_of_2(outer)))


def count_tiles(pixels: int, channels: int, sizes: Sizes) -> int:
    return cdiv(pixels, sizes["BLOCK_P"]) * cdiv(channels, sizes["BLOCK_C"])


STRIPS = 1024  # programs of four warps that keep any GPU busy


@lru_cache(maxsize=1024)
def strip(columns: int, rows: int, images: int) -> Sizes:
    """Return a stencil's strip of rows: one pixel a thread, because taps beside a pixel cannot be read as vectors.

    A program walks its rows one after another. Where programs are few, strips are short: a row more is then time, and
    the rows that neighbours read twice are not. Not to be changed.
    """
    block, height = min(power_of_2(columns), 128), 16
    while height > 4 and images * cdiv(columns, block) * cdiv(rows, height) < STRIPS:
        height //= 2
    return {"ROWS": height, "BLOCK": block, "num_warps": max(1, block // 32)}


LONGEST_ROW = 16384  # channels: a row must fit into the registers of one program


def as_rows(x: Tensor) -> Tensor:
    """Return (..., C) as (rows, C), channels side by side; a copy only where memory is not so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@lru_cache(maxsize=1024)
def whole_rows(channels: int, itemsize: int) -> Sizes:
    """Return the block of a program that holds whole rows in registers. Not to be changed."""
    block_c = power_of_2(channels)
    block_p = max(1, 1024 // block_c)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps(block_p * block_c, itemsize)}


GROUP_PROGRAMS = 512  # some four for each multiprocessor of a large GPU; tuning tries more
MOST_CHUNKS = 64  # each program of the second launch reads all chunks' sums


@lru_cache(maxsize=1024)
def group_blocks(
    batch: int, pixels: int, channels: int, num_groups: int, inner: bool, itemsize: int
) -> Sizes:
    """Return a group norm's block of whole groups by pixels, and the pixels of a program's chunk. Not to be changed."""
    group, groups = channels // num_groups, 1
    if inner:  # neighbouring groups until rows are long and begin where a vector may
        while num_groups % (2 * groups) == 0 and not _well_aligned(group * groups * itemsize):
            groups *= 2
    block_c = power_of_2(group * groups)
    block_p = max(1, min(2048 // block_c, power_of_2(pixels)))
    chunks = cdiv(GROUP_PROGRAMS, batch * (num_groups // groups))
    chunk = cdiv(pixels, min(chunks, MOST_CHUNKS, cdiv(pixels, block_p)))
    chunk = cdiv(chunk, block_p) * block_p
    sizes = {"GROUP": group, "GROUPS": groups, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return sizes | {"num_warps": warps(block_p * block_c, itemsize), "chunk": chunk, "STAGES": 1}


def _well_aligned(row_bytes: int) -> bool:
    return row_bytes >= 128 and row_bytes % VECTOR_BYTES == 0


def warps(elements: int, itemsize: int) -> int:
    """Return two vectors a thread, between 1 and 8 warps."""
    wanted = elements * itemsize // (2 * VECTOR_BYTES * 32)
    return min(8, power_of_2(max(1, wanted)))


def call(function: Callable[..., T], operator: Callable[..., T], *args) -> T:
    """`operator(*args)`, the registered form of `function`; `function` itself where nobody has to see the call.

    Autograd, a compiler and a dispatch mode, as that of fake tensors, need the operator; going through the dispatcher
    and the autograd machinery costs the CPU more than the launch itself.
    """
    seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return (operator if seen or needs_grad(*args) else function)(*args)


def on_device(function: Callable[..., T]) -> Callable[..., T]:
    """Triton launches on the current device: make it the one that the first tensor is on."""

    @wraps(function)
    def guarded(first: Tensor, *args, **options) -> T:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *args, **options)
        with torch.cuda.device(first.device):
            return function(first, *args, **options)

    return guarded


def needs_grad(*args) -> bool:
    """Return whether autograd records what is done with these tensors, or lists of tensors."""
    if not torch.is_grad_enabled():
        return False
    tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """Return (count,) int32 zeros, by which the blocks of a launch find out which of them is the last to finish.

    The last block puts its ticket back to zero: one buffer serves every launch on a stream, and none has to clear it.
    A launch that fails before it runs has not touched it; one that fails while it runs takes the CUDA context, and the
    buffer, with it. A captured graph, which may be replayed on another stream, gets a buffer of its own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _tickets or len(_tickets[key]) < count:
        _tickets[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _tickets[key]
