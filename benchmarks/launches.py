"""python -m benchmarks.launches [--out benchmarks/results] [--host]

GPU launches, bytes moved and bytes allocated at SDXL's shapes in bfloat16, counted without a GPU; nothing is timed. By
one call of each op, ours and as a composition of PyTorch's, kornia's or diffusers' operations; and by a whole step of
denoising and of training, diffusers' and ours. Writes <out>/launches.csv and <out>/steps.csv.

How they are counted, and that it is the least: benchmarks/static/counter.py. Allocated are outputs and temporaries,
whether or not they live at the same time.

With --host instead: the microseconds of Python and of allocating that each launch takes before it is Triton's, beside
an eager `add_` of eight numbers. Writes <out>/host.csv, by default where this machine's results are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from timeit import timeit
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.kernel_cases import KORNIA, plain_geglu, plain_layer_norm
from benchmarks.measure import RESULTS, check_out, environment, results_folder, write_rows
from benchmarks.static import sass
from benchmarks.static.counter import Count, count_again
from benchmarks.static.host_calls import FIRST, FIRST_FEW_TILES, Call, calls, tensors_of
from benchmarks.static.steps import count_steps
from kernels import reference
from kernels.launching import launch
from runtime.cli.command import Parser, exit_code

DIFFERENTIABLE = {
    "": ("features", "model_output", "x", "residual"),
    "with parameters": ("x", "weight", "bias"),
}


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.launches", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, help="folder of the CSV files")
    parser.add_argument("--host", action="store_true", help="time what is done before a launch")
    options = parser.parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Count, or time, write, print."""
    out = options.out or (results_folder() if options.host else RESULTS)
    check_out(out)
    if options.host:
        write_rows(out / "host.csv", host_times())
        return
    ops, steps = compare(), count_steps()
    write_rows(out / "launches.csv", ops)
    write_rows(out / "steps.csv", steps)
    for row in ops:
        name = f"{row['op']:18} {row['variant']:17} {row['way']:17}"
        fewer = f"{row['launches_plain']:3} -> {row['launches']} launches"
        print(f"{name} {fewer}, {row['bytes_plain'] / 2**20:8.2f} -> {row['bytes'] / 2**20:7.2f} MiB")
    for row in steps:
        moved, allocated = (f"{row[name] / 2**30:6.1f} GiB" for name in ("moved", "allocated"))
        made = f"{row['allocations']:5} allocations of {allocated}"
        print(f"{row['step']:10} {row['side']:18} {row['launches']:5} launches, {moved} moved, {made}")


def compare() -> list[dict]:
    """Return a row for every op and variant: forward, and forward with backward."""
    rows = []
    with mock.patch.object(launch, "tickets", cache(launch.tickets)):  # as on a GPU: kept from call to call
        for call in calls("cpu", torch.bfloat16, "nhwc", FIRST):
            if call.way == "forward":
                forward = call
                composed = partial(compose, call.op, call.inputs)
                ours = [call.run]
            else:  # of the forward call before it
                composed = partial(compose_with_gradients, call, forward.inputs)
                ours = [forward.run, call.run]
            rows.append(_row(call, count_again(partial(_all, ours)), count_again(composed)))
    return rows


def host_times(calls_each: int = 200, repeats: int = 30) -> list[dict]:
    """Return a row for each op: microseconds a launch on this thread, the least of `repeats`.

    Outputs are small: of large ones the CPU asks the system for memory each time, where CUDA's allocator keeps it.
    """
    number, rows = torch.ones(8), []
    with mock.patch.object(launch, "tickets", cache(launch.tickets)), torch.inference_mode():
        for call in calls("cpu", torch.bfloat16, "nhwc", FIRST_FEW_TILES):
            with sass.noted_launches() as launches:
                call.run()  # sizes are picked, modules are made
                launches.clear()
                call.run()
            count, found = len(launches), {"add_": [], "run": []}
            with mock.patch.object(JITFunction, "run", no_launch):
                for _ in range(repeats):
                    found["run"].append(timeit(call.run, number=calls_each))
                    found["add_"].append(timeit(lambda: number.add_(1), number=calls_each))
            host, add = (1e6 * min(found[name]) / calls_each for name in ("run", "add_"))
            row = {"op": call.op, "variant": call.variant, "way": call.way, "launches": count}
            row |= {"us_a_launch": round(host / count, 2), "us_add_": round(add, 2), **environment()}
            rows.append(row)
            print(
                f"{call.op:18} {call.variant:17} {call.way:9} {row['us_a_launch']:6.1f} us a launch, add_ {add:4.1f}"
            )
    return rows


def no_launch(*_, **__) -> None: ...


def _all(runs: list[Callable[[], object]]) -> None:
    for run in runs:
        run()


def _row(call: Call, ours: Count, plain: Count) -> dict:
    return {
        "op": call.op,
        "variant": call.variant,
        "way": "forward" if call.way == "forward" else "forward+backward",
        "shape": call.shape,
        "launches_plain": plain.launches,
        "launches": ours.launches,
        "bytes_plain": plain.allocated,
        "bytes": ours.allocated,
        "torch": torch.__version__,
    }


def compose_with_gradients(call: Call, inputs: dict[str, object]) -> None:
    names = DIFFERENTIABLE.get(call.variant, DIFFERENTIABLE[""])
    for tensor in tensors_of(inputs.values()):
        tensor.requires_grad_(False)
    leaves = tensors_of([inputs.get(name) for name in names])
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = compose(call.op, inputs)
    grads = [call.inputs[name] for name in ("grad_total", "grad") if name in call.inputs]
    if call.op.endswith("loss"):  # of losses there are one or two, (B,) each, and rows of `grad`
        grads = grads[0].unbind()
    torch.autograd.grad(outputs, leaves, grads)


def compose(op: str, inputs: dict[str, object]) -> Tensor | tuple[Tensor, ...]:
    """Return the op as one writes it without kernels."""
    return COMPOSED[op](**inputs)


def compose_inject(hidden, features, masks, scales) -> Tensor:
    terms = [
        f * (m * scale).to(f.dtype) for f, m, scale in zip(features, masks, scales.unbind(), strict=True)
    ]
    return hidden + sum(terms[1:], terms[0])  # one row of features is broadcast over the guidance halves


def compose_guidance(sample, output, coefficients, previous, rescale) -> tuple[Tensor, Tensor]:
    """diffusers' guidance, its rescale_noise_cfg and DPMSolverMultistepScheduler's second-order step."""
    sigma, alpha, ratio, keep, move = 0.7, 0.8, 1.2, 0.9, 0.3  # diffusers' own are numbers too
    if len(output) == 2 * len(sample):
        unguided, guided = output.chunk(2)
        output = unguided + 5.0 * (guided - unguided)
        if rescale:
            spreads = [t.std(dim=(1, 2, 3), keepdim=True) for t in (guided, output)]
            output = rescale * (output * (spreads[0] / spreads[1])) + (1 - rescale) * output
    denoised = (sample - sigma * output) / alpha
    slope = ratio * (denoised - previous)
    return keep * sample - move * denoised - 0.5 * move * slope, denoised


COMPOSED = KORNIA | {
    "add_layer_norm": plain_layer_norm,
    "float8_rows": reference.float8_rows,
    "inject": compose_inject,
    "group_norm_silu": reference.group_norm_silu,
    "geglu": plain_geglu,
    "guidance_step": compose_guidance,
}


if __name__ == "__main__":
    sys.exit(main())
