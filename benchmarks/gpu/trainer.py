"""A training step of an adapter at full size: ours and diffusers' script's, each side alone in memory."""

from __future__ import annotations

import argparse
from functools import cache, partial

from benchmarks.gpu.device import ON_GPU, free_memory, peak_gib, time_calls
from benchmarks.gpu.ours import Recorder, profiled
from benchmarks.gpu.world import SIZE
from benchmarks.training import diffusers_step, our_step
from benchmarks.training_world import full_size_parts
from kernels import ops

SECONDS = 15


def run(recorder: Recorder, small: bool) -> None:
    dtype = "bf16" if ON_GPU else "fp32"
    for batch in (4, 1) if ON_GPU else (1,):
        sides = {"ours": our_step, "diffusers": diffusers_step, "ours, kernels off": plain_step}
        left = {name: make for name, make in sides.items() if case_of(name, batch) not in recorder.table}
        if not left or not recorder.budget.allows(SECONDS):
            continue
        options = argparse.Namespace(batch=batch, small=small, full_size=not small)
        world = full_size_parts(options, dtype, None)
        for name, make in left.items():
            step = cache(partial(make, world))  # made within its row, which notes a failure
            measured = partial(row, step, name, batch)
            done = recorder.measure(case_of(name, batch), measured, SECONDS)
            if done and ((name == "ours" and batch > 1) or not ON_GPU):
                profiled(recorder, "training", step())
            del step, measured
            free_memory()
        del world
        free_memory()


def case_of(name: str, batch: int) -> str:
    return f"training step, {name}, batch {batch}"


def plain_step(world):
    with ops.use_backend("torch"):
        step = our_step(world)

    def plain() -> None:
        with ops.use_backend("torch"):
            step()

    return plain


def row(made, name: str, batch: int) -> dict[str, object]:
    step = made()
    peak = peak_gib(step)
    times = time_calls(step, 2.0, least=3)
    rate = round(batch * 1e3 / times["p50_ms"], 2)
    values = {"stage": "training", "side": name, "size": SIZE, "images": batch, "memory_gib": peak}
    return values | times | {"samples_per_second": rate}
