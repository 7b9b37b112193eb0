"""A training step of an adapter at full size: ours and diffusers' script's, each side alone in memory."""

from __future__ import annotations

import argparse

from benchmarks.gpu.device import ON_GPU, free_memory, peak_gib, time_calls
from benchmarks.gpu.ours import Recorder, profiled
from benchmarks.gpu.world import SIZE
from benchmarks.training import diffusers_step, full_size_parts, our_step
from kernels import ops

SECONDS = 15


def run(recorder: Recorder, small: bool) -> None:
    dtype = "bf16" if ON_GPU else "fp32"
    for batch in (4, 1) if ON_GPU else (1,):
        options = argparse.Namespace(batch=batch, small=small, full_size=not small)
        world = full_size_parts(options, dtype, None)
        sides = {"ours": our_step, "diffusers": diffusers_step, "ours, kernels off": plain_step}
        for name, make in sides.items():
            case = f"training step, {name}, batch {batch}"
            if case in recorder.table or not recorder.budget.allows(SECONDS):
                continue
            step = make(world)
            recorder.measure(case, lambda step=step, name=name, n=batch: row(step, name, n), SECONDS)
            if (name == "ours" and batch > 1) or not ON_GPU:
                profiled(recorder, "training", step)
            del step
            free_memory()
        del world
        free_memory()


def plain_step(world):
    with ops.use_backend("torch"):
        step = our_step(world)

    def plain() -> None:
        with ops.use_backend("torch"):
            step()

    return plain


def row(step, name: str, batch: int) -> dict[str, object]:
    peak = peak_gib(step)
    times = time_calls(step, 2.0, least=3)
    rate = round(batch * 1e3 / times["p50_ms"], 2)
    values = {"stage": "training", "side": name, "size": SIZE, "images": batch, "memory_gib": peak}
    return values | times | {"samples_per_second": rate}
