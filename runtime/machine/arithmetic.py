"""What this CPU computes well in: the choice of a data type rests on one small product of each, timed once a process.

A CPU without AMX or AVX-512 multiplies in bfloat16 and float16 tens to a thousand times more slowly than in float32.
What PyTorch, oneDNN and MKL make of a processor also depends on the environment (ATEN_CPU_CAPABILITY,
ONEDNN_MAX_CPU_ISA): oneDNN is asked and the product is timed instead of the processor's flags being read.
"""

from __future__ import annotations

import warnings
from functools import cache
from time import perf_counter
from timeit import timeit

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SIDE = 256  # of the matrices: 0.5 ms in float32, 25 ms in bfloat16 on two AVX2 cores
SLOW = 1.5  # times float32's seconds from which a data type is not worth choosing


def name_of(dtype: torch.dtype) -> str:
    """Return the name in DTYPES; PyTorch's own for another."""
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype).removeprefix("torch."))


@cache
@torch.inference_mode()
def product_seconds(dtype: torch.dtype) -> float:
    """Return the least seconds that a product of two SIDE x SIDE matrices takes on the CPU in `dtype`.

    The least of many, for as long as they are short: another process may keep a thread waiting in most of them.
    """
    a, least, start = torch.ones(SIDE, SIDE, dtype=dtype), float("inf"), perf_counter()
    for done in range(50):
        least = min(least, timeit(lambda: a @ a, number=1))
        if done >= 2 and perf_counter() - start > 0.05:
            break
    return least


def has_kernels(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has kernels of its own for `dtype` on this CPU; without them PyTorch is slow in it."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, known[dtype])()


def slowdown(dtype: torch.dtype) -> float:
    """Return how many times the seconds of float32 a product takes on this CPU in `dtype`."""
    return product_seconds(dtype) / product_seconds(torch.float32)


def is_quick(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `dtype` is worth choosing on `device`: always, but for a CPU that is slow in it."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    return has_kernels(dtype) and slowdown(dtype) <= SLOW


def half_precision(device: torch.device) -> torch.dtype:
    """Return the data type of mixed precision on `device`: bfloat16, or float32 on a CPU that is slow in that."""
    return torch.bfloat16 if is_quick(torch.bfloat16, device) else torch.float32


def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Warn, in one line, where `dtype` was asked for and this CPU is slower in it than in float32."""
    if not is_quick(dtype, device):
        times = f"at least {slowdown(dtype):.0f} times as long for a product as in fp32"
        warnings.warn(
            f"dtype {name_of(dtype)}: this CPU takes {times}; use fp32, which is the default here",
            stacklevel=3,
        )
