"""The facts about a run: what ran, where, how long, in how much memory."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

import kernels

PACKAGES = ("diffusers", "transformers")


def versions() -> dict[str, str]:
    """Return the versions of this project, Python, and the packages whose versions can change a picture."""
    found = {package: metadata.version(package) for package in PACKAGES}
    # torch's own word names its build too ("+cpu", "+cu130"), which its metadata on PyPI does not
    found["torch"] = torch.__version__
    return {"localcontrol": kernels.__version__, "python": platform.python_version(), **found}


def commit() -> str:
    """Return the commit of the checkout this runs from, "-dirty" where it was changed since; "unknown" outside of one.

    Results that a benchmark has just written do not count: the next one in a row has the same commit.
    """
    tracked = ("--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    head = _git("rev-parse", "--short", "HEAD")
    return head + "-dirty" * bool(_git("status", "--porcelain", *tracked)) if head else "unknown"


def _git(*arguments: str) -> str:
    """Return what git prints in this checkout; nothing where it fails or is missing."""
    call = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def device_name(device: torch.device) -> str:
    """Return the hardware's own name, such as "NVIDIA H200" or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _of_cpu("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """Return who has made the CPU, as it says itself: "GenuineIntel", "AuthenticAMD"; "" where nothing tells."""
    found = re.search(r"\w*(?:Intel|AMD|Hygon)\w*", _of_cpu("vendor_id") or platform.processor())
    return found[0] if found else ""


def _of_cpu(name: str) -> str:
    """Return what Linux says of the first core under a name; "" where it says nothing, or is another system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Return the process's largest use so far, bytes: "ram" (resident; None where unknown) and on a GPU "gpu"."""
    try:
        import resource
    except ImportError:  # Windows
        peak = {"ram": None}
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


@contextmanager
def timed(timings: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    """Add the wall-clock seconds of the block, GPU work included."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.current_stream(
            device
        ).synchronize()  # of the device: not while another thread captures a graph
    timings[stage] = time.perf_counter() - start
