"""python -m benchmarks.machine

Prints what this machine is: processor, its instructions and how quickly it multiplies in each data type, memory, GPU,
and the versions of what takes part in a picture. For the head of a log, or of a report of a fault.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import torch

from runtime.machine.arithmetic import DTYPES, SIDE, is_quick, product_seconds
from runtime.machine.report import commit, device_name, versions

PACKAGES = (
    "triton",
    "numpy",
    "peft",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
CPU = torch.device("cpu")


def main() -> int:
    """Print a line for each fact; exit code 0."""
    for name, value in facts():
        print(f"{name:12} {value}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """Yield the facts, each with its name."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    yield "processor", f"{device_name(CPU)}, {cores} cores, {memory.total / 2**30:.0f} GiB of memory"
    yield "instructions", ", ".join(instructions()) or "not known"
    yield "PyTorch uses", torch.backends.cpu.get_cpu_capability()
    for name, dtype in DTYPES.items():
        quick = "" if is_quick(dtype, CPU) else ", slower than fp32"
        yield (
            name,
            f"{2 * SIDE**3 / product_seconds(dtype) / 1e9:.1f} GFLOP/s in a {SIDE} x {SIDE} product{quick}",
        )
    if torch.cuda.is_available():
        yield "GPU", device_name(torch.device("cuda"))
    yield "versions", ", ".join(f"{name} {version}" for name, version in found_versions().items())
    yield "commit", commit()


def instructions() -> list[str]:
    """Return those of INSTRUCTIONS that the processor has; nothing where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [name for name in INSTRUCTIONS if name in flags]


def found_versions() -> dict[str, str]:
    """Return the version of every package of interest that is installed."""
    found = versions()
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
