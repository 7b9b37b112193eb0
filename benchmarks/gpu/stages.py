"""The stages, the most valuable first: which run in one process, and how long each may take at most."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.device import ON_GPU
from benchmarks.gpu.rows import Budget

ORDER = (
    "tests",
    "kernels",
    "step",
    "picture",
    "vae",
    "training",
    "peers",
    "fp8",
    "batch",
    "offload",
    "tuning",
)
TESTS = (
    "tests/kernels/test_real_sizes.py",
    "tests/kernels",
    "tests/runtime/model",
    "tests/runtime/optimize",
    "tests/runtime/engines/test_torch_compile.py",
)


@dataclass(frozen=True)
class Group:
    """Stages of one process, over one model."""

    stages: tuple[str, ...]
    share: float  # of the whole budget, at most


GROUPS = (
    Group(("tests",), 0.25),
    Group(("kernels",), 0.15),
    Group(("step", "picture", "vae", "batch"), 0.5),
    Group(("training",), 0.4),
    Group(("peers",), 0.4),
    Group(("fp8",), 0.4),
    Group(("offload",), 0.3),
    Group(("tuning",), 0.5),
)


def run_group(stages: list[str], folder: Path, seconds: float, small: bool) -> None:
    """Run the stages of one group in this process."""
    budget = Budget(seconds)
    if stages == ["tests"]:
        run_tests(folder, seconds, small)
        return
    if stages[0] in ("kernels", "tuning"):
        from benchmarks import kernels

        dtype, batches, size = ("fp32", [1], 32) if small else ("bf16", [1, 4], 1024)
        if stages == ["tuning"]:
            kernels.run_tuned(folder, budget, dtype, batches[:1], size)
        else:
            kernels.run(folder, budget, dtype, batches, size)
        return
    from benchmarks.gpu import memory, ours, peers, trainer

    recorder = ours.Recorder(folder, budget)
    alone: dict[str, Callable] = {
        "training": trainer.run, "peers": peers.run, "fp8": ours.fp8_stage, "offload": memory.run
    }  # fmt: skip
    if stages[0] in alone:
        alone[stages[0]](recorder, small)
    else:
        ours.run(stages, recorder, small)


def run_tests(folder: Path, seconds: float, small: bool) -> None:
    """Run the tests marked `gpu`, those at real sizes first; the log goes to <folder>/tests.log."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "2" if small else "12", "-o", "addopts="]
    command += [
        "--dist",
        "worksteal",
        "--timeout",
        "120",
        "-rfE",
        "--tb=line",
        "-v",
        "--strict-markers",
        *TESTS,
    ]
    if small:
        command = [*command[:3], "--collect-only", "-q", "-o", "addopts=", *TESTS]
    log = folder / "tests.log"
    with log.open("w") as file:
        try:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {seconds:.0f} s\n")
    print(*log.read_text(errors="replace").splitlines()[-25:], sep="\n", flush=True)


def run_all(options: argparse.Namespace) -> int:
    """Run every group that has a stage that is asked for, in a process of its own; return the number that failed."""
    budget, failed = Budget(options.budget), 0
    # Triton reads it when it is first imported: without a GPU its interpreter runs the kernels.
    environment = os.environ | ({} if ON_GPU else {"TRITON_INTERPRET": "1"})
    for group in GROUPS:
        stages = [stage for stage in group.stages if stage in options.stages]
        seconds = min(budget.left(), group.share * options.budget)
        if not stages or seconds < 5:
            continue
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--out",
            str(options.out),
            "--budget",
            f"{seconds:.0f}",
        ]
        command += ["--here", "--stages", ",".join(stages), *["--small"] * options.small]
        print(f"== {', '.join(stages)}: {seconds:.0f} s of {budget.left():.0f}", flush=True)
        try:
            done = subprocess.run(
                command, env=environment, timeout=min(seconds + 60, budget.left() + 5), check=False
            )
            failed += done.returncode != 0
        except subprocess.TimeoutExpired:
            print(
                f"{', '.join(stages)}: stopped after {seconds:.0f} s; what was measured is kept", flush=True
            )
    return failed
