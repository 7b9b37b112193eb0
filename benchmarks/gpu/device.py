"""The device under test: what it is, what it can do at most, and how long a call takes on it.

Where there is no GPU everything runs on the CPU, with small models: a rehearsal, which finds what would fail.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from itertools import pairwise

import torch

from benchmarks.measure import environment
from runtime.engines.cuda_graph import captured

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
WARM_UP = 3
# the columns that `state` fills
STATE = ("device", "threads", "torch", "triton", "diffusers", "commit", "date", "clock_mhz", "temperature_c")
# those that rows of one run share, which goes on where it was cut off
SAME = ("device", "torch", "triton", "diffusers", "commit")


def time_calls(run: Callable[[], object], seconds: float = 1.0, least: int = 5) -> dict[str, float]:
    """Return p20, p50 and p80 in milliseconds of calls one after the other, for about `seconds` after a warm-up."""
    for _ in range(WARM_UP if ON_GPU else 1):
        run()
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    count = max(least, int(seconds / max(time.perf_counter() - start, 1e-6))) if ON_GPU else 1
    times = _events(run, min(count, 500)) if ON_GPU else _clock(run)
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {f"p{10 * (i + 1)}_ms": round(cuts[i], 4) for i in (1, 4, 7)}


def _events(run: Callable[[], object], count: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [one.elapsed_time(other) for one, other in pairwise(marks)]


def _clock(run: Callable[[], object]) -> list[float]:
    start = time.perf_counter()
    run()
    return [(time.perf_counter() - start) * 1e3]


def capture(runs: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], str]:
    """Return the calls one after the other as a CUDA graph, and a note where they cannot be one."""

    def together() -> None:
        for run in runs:
            run()

    if not ON_GPU:
        return together, ""
    try:
        return captured(together, DEVICE, torch.cuda.graph_pool_handle()), ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        return together, f"not captured: {error}".partition("\n")[0][:150]


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give back what no longer has a name."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def limit_memory(gigabytes: float | None) -> None:
    """Have this process get no more of the GPU's memory; None lifts it. On a CPU there is no limit."""
    if ON_GPU:
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes * 1e9 / total)


def peak_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """Return what is allocated on the GPU before a call, and the most during it; zeros on a CPU."""
    if not ON_GPU:
        run()
        return 0, 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return before, torch.cuda.max_memory_allocated()


def peak_gib(run: Callable[[], object]) -> float | str:
    """Return the most that is allocated on the GPU during a call, GiB, all that is resident included."""
    _, peak = peak_bytes(run)
    return round(peak / 2**30, 3) if ON_GPU else ""


def peak_mib(run: Callable[[], object]) -> float | str:
    """Return MiB allocated during a call, beyond what was there."""
    before, peak = peak_bytes(run)
    return round((peak - before) / 2**20, 2) if ON_GPU else ""


@cache
def copy_rate() -> float:
    """Return bytes a second of a copy in device memory that no cache holds, reading and writing counted."""
    size = 2**30 if ON_GPU else 2**24
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size / (time_calls(lambda: target.copy_(source), 0.1)["p50_ms"] / 1e3)


@cache
def matmul_rate(dtype: torch.dtype) -> float:
    """Return FLOP/s of a large square product of random numbers."""
    side = 8192 if ON_GPU else 256
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / (time_calls(lambda: torch.mm(a, b, out=out), 0.3)["p50_ms"] / 1e3)


def now() -> dict[str, object]:
    """Return what rows of this program on this machine have in the columns of SAME."""
    found = state()
    return {name: found[name] for name in SAME}


def state() -> dict[str, object]:
    """Return what was measured with, and the GPU's clock and temperature now."""
    found = environment() | {"triton": metadata.version("triton"), "clock_mhz": "", "temperature_c": ""}
    with suppress(RuntimeError, AssertionError, ModuleNotFoundError, AttributeError):  # no GPU, or no NVML
        found |= {"clock_mhz": torch.cuda.clock_rate(), "temperature_c": torch.cuda.temperature()}
    return found
