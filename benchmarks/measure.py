"""What every benchmark shares: interleaved timing, and rows that say where, with what and when they were measured."""

from __future__ import annotations

import csv
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runtime.errors import InputError
from runtime.machine.arithmetic import is_quick
from runtime.machine.files import replacing
from runtime.machine.report import commit, device_name
from runtime.optimize.packed import PackedLinear, packs_here

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results")
DTYPE_HELP = "default: fp32, and bf16 unless this is a CPU that is slow in it"  # see `default_dtypes`


def interleave(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return seconds of each run, `repeats` times in turn (A B A B ...) after one of each that is not counted.

    Taking turns keeps a machine whose speed drifts from favouring either.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of the times, in milliseconds."""
    if len(seconds) < 2:
        return dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), round(seconds[0] * 1e3, 3))
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {f"p{10 * (i + 1)}_ms": round(cuts[i] * 1e3, 3) for i in (1, 4, 7)}


def matmul_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5, limit: float = 10.0) -> float:
    """Return the TFLOP/s of the best square matrix product here: what the arithmetic of `dtype` is compared with.

    On a CPU of PyTorch's own product, or of a packed one where a pipeline would use it; sizes grow until the next one
    would take more than `limit` seconds.
    """
    best = 0.0
    for side in (256, 512, 1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        runs = {"matmul": lambda a=a, b=b: a @ b}
        if packs_here(dtype, device):
            runs["packed"] = partial(PackedLinear(b, None), a)
        start = time.perf_counter()
        for seconds in interleave(runs, repeats).values():
            best = max(best, 2 * side**3 / min(seconds) / 1e12)
        if (
            device.type == "cpu" and 8 * (time.perf_counter() - start) > limit
        ):  # twice the side: 8 times the work
            break
    return best


def default_dtypes(device: torch.device) -> list[str]:
    """Return the data types that a benchmark compares unless told otherwise: fp32, and bf16 where it is quick."""
    return ["fp32", *["bf16"] * is_quick(torch.bfloat16, device)]


def flops(run: Callable[[], None]) -> int:
    """Return the floating-point operations of one call in torch: convolutions and matrix products, attention's too."""
    packed = (torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._convolution_pointwise)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(packed, weighted_flops))
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


def weighted_flops(x: Sequence[int], weight: Sequence[int], *_, out_shape: Sequence[int], **__) -> int:
    """Return those of a linear layer or a convolution of these shapes; weight: (out, in, ...)."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def environment() -> dict[str, str]:
    """Return what the figures were measured with."""
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def results_folder() -> Path:
    """Return where this device's figures are committed: benchmarks/results/cpu, .../nvidia-h200."""
    if not torch.cuda.is_available():
        return RESULTS / "cpu"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def check_counts(**counts: int) -> None:
    """Raise InputError, naming the option, where there is nothing to count."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} {count}: expected 1 or more")


def engine_name(name: str, folder: str, taken: Mapping[str, object]) -> str:
    """Return the name of an engine's row, with its folder where another one has it: neither replaces the other."""
    return f"{name}, {folder}" if name in taken else name


def check_out(folder: Path) -> None:
    """Raise InputError where results cannot be written there; before anything is measured."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"out {folder}: {there} is not a folder that can be written to")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a plot as a PNG, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial_file:
        figure.savefig(partial_file, dpi=110, format="png")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replace the file by these rows under their header, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
