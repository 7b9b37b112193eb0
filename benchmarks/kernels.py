"""python -m benchmarks.kernels [--batch 1 4] [--dtype bf16] [--budget 300] [--out benchmarks/results/<device>]

Times every kernel at SDXL's shapes against plain PyTorch, torch.compile and kornia, on the same tensors. A provider is
timed only once its output has been found right. A call's time is the device's: calls on different tensors, together
larger than the cache, are captured in one CUDA graph and replayed. `host_us` is what one call takes on the CPU. The
share is of the copy bandwidth of this device, measured in the same run: what a kernel that moves the least bytes there
are would reach. Rows go to <out>/kernels.csv as they are measured; those of this commit, device and versions that are
there already are not measured again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.device import DEVICE, ON_GPU, STATE, capture, copy_rate, now, peak_mib, state, time_calls
from benchmarks.gpu.rows import Budget, Table
from benchmarks.kernel_cases import Case, cases, large_cases
from benchmarks.measure import check_counts, check_out, results_folder
from kernels import reference
from kernels.launching import tuning
from kernels.reference import Float8Rows
from runtime.cli.command import Parser, exit_code
from runtime.errors import InputError
from runtime.machine.arithmetic import DTYPES

# relative, of a result that is right but was rounded after every operation; in a rehearsal the interpreter's float8,
# which loses carries, passes too
ERROR = 2e-2 if ON_GPU else 0.1
BEYOND_CACHE, MOST_SETS = 2**28, 32  # bytes that inputs take together, and sets of them
COMPILE_SECONDS, SECONDS, TUNING_SECONDS = 20, 2, 30
TUNED = ("inject", "geglu", "group_norm_silu")
FIELDS = ("op", "shape", "dtype", "provider", "direction", "p20_us", "p50_us", "p80_us", "host_us", "gb_s")
FIELDS += ("share_of_copy", "peak_mib", "note")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.kernels", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 4], help="images: guidance doubles the rows"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--budget", type=float, default=600, help="seconds (default 600)")
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the CSV file")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run_options(options))


def run_options(options: argparse.Namespace) -> None:
    check_counts(batch=min(options.batch))
    check_out(options.out)
    if not ON_GPU:
        raise InputError(
            "kernels: a CUDA device is needed: on a CPU they only run interpreted, which says nothing of speed"
        )
    run(options.out, Budget(options.budget), options.dtype, options.batch)


def table_of(folder: Path) -> Table:
    """Return the table of a folder's kernels; InputError where its file is of other columns."""
    return Table(folder / "kernels.csv", FIELDS + STATE, now())


def run_tuned(folder: Path, budget: Budget, dtype: str, batches: list[int], size: int) -> None:
    """Have sizes timed where kernels take tuned ones, and measure with the best, kept in <folder>/localcontrol."""
    os.environ |= {tuning.VARIABLE: "1", "XDG_CACHE_HOME": str(folder.resolve())}
    table = table_of(folder)
    for case in all_cases(DTYPES[dtype], batches, size):
        if case.op in TUNED and budget.allows(TUNING_SECONDS):
            measure(table, budget, case, "ours, tuned", case.providers()["ours"], dtype)


def run(folder: Path, budget: Budget, dtype: str, batches: list[int], size: int = 1024) -> None:
    """Measure until the budget is spent: the kernels and eager PyTorch first, what has to be compiled last."""
    table = table_of(folder)
    torch.manual_seed(0)
    for slow in (False, True):
        for case in all_cases(DTYPES[dtype], batches, size):
            for name, provider in case.providers().items():
                if (name == "compile") == slow:
                    measure(table, budget, case, name, provider, dtype)


def all_cases(dtype: torch.dtype, batches: list[int], size: int) -> Iterator[Case]:
    """Yield SDXL's shapes, and on a GPU those that no cache holds, at which only bandwidth counts."""
    yield from cases(DEVICE, dtype, batches[:1], size)
    yield from large_cases(DEVICE, dtype, 512 if ON_GPU else 2, size)
    yield from cases(DEVICE, dtype, batches[1:], size)


def measure(table: Table, budget: Budget, case: Case, name: str, provider: Callable, dtype: str) -> None:
    """Add the rows of one provider: forward, and forward with backward where there are gradients."""
    directions = {"forward": partial(forward, provider)}
    if case.differentiable:
        directions["forward+backward"] = partial(with_backward, case, provider)
    for direction, prepare in directions.items():
        key = f"{case.op} {case.shape} {dtype} {name} {direction}"
        if key in table or not budget.allows(COMPILE_SECONDS if name == "compile" else SECONDS):
            continue
        torch.compiler.reset()  # after 8 shapes it would run uncompiled, and be called compiled
        what = {"op": case.op, "shape": case.shape, "dtype": dtype, "provider": name, "direction": direction}
        try:
            check(case, provider)
            moved = case.bytes_moved if direction == "forward" else None
            values = figures(prepare, case, moved)
        except Exception as error:
            values = {"note": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
        table.add(key, what | values | state())
        share = f"{float(values['share_of_copy']):5.0%} of copy" if values.get("share_of_copy") else ""
        print(f"{key:70} {values.get('p50_us', '')!s:>10} us {share} {values.get('note', '')}", flush=True)


def figures(prepare: Callable, case: Case, moved: int | None) -> dict[str, object]:
    """Return microseconds of a call on the device and on the host, and the rate at which it moves its bytes."""
    sets = copies(case)
    runs = [prepare(inputs) for inputs in sets]
    host = host_microseconds(runs[0])
    together, note = capture(runs)
    times = {
        f"{name[:3]}_us": round(ms * 1e3 / len(runs), 3) for name, ms in time_calls(together, 0.1).items()
    }
    rate = None if moved is None else moved / (times["p50_us"] / 1e6)
    values = times | {"host_us": round(host, 1), "peak_mib": peak_mib(runs[0]), "note": note}
    return values if rate is None else values | {
        "gb_s": round(rate / 1e9), "share_of_copy": round(rate / copy_rate(), 3)
    }  # fmt: skip


def copies(case: Case) -> list[dict]:
    """Return the inputs, and as many clones of them as no cache holds."""
    count = min(MOST_SETS, max(2, BEYOND_CACHE // max(1, case.bytes_moved))) if ON_GPU else 1
    return [_each(case.inputs, torch.clone) for _ in range(count)]


def forward(provider: Callable, inputs: dict) -> Callable[[], object]:
    return partial(provider, **inputs)


def with_backward(case: Case, provider: Callable, inputs: dict) -> Callable[[], object]:
    inputs, leaves = dict(inputs), []
    for name in case.differentiable:
        inputs[name] = _each(inputs[name], lambda t: t.detach().clone().requires_grad_())
        leaves += inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
    grads = [torch.ones_like(out) for out in _as_tuple(provider(**inputs))]
    return lambda: torch.autograd.grad(_as_tuple(provider(**inputs)), leaves, grads)


def check(case: Case, provider: Callable) -> None:
    """Raise RuntimeError where an output is further from the reference than roundings explain."""
    expected = _as_tuple(getattr(reference, case.op)(**_each(case.inputs, Tensor.double)))
    for a, e in zip(_as_tuple(provider(**case.inputs)), expected, strict=True):
        error = ((a.double() - e).norm() / e.norm().clamp_min(1e-30)).item()
        if not error <= ERROR:
            raise RuntimeError(f"relative error {error:.1e}: it is not timed")


def host_microseconds(run: Callable[[], object], calls: int = 50) -> float:
    """Return what a call takes on the CPU: the device is behind all the while, and is not waited for."""
    for _ in range(3 if ON_GPU else 0):
        run()
    if not ON_GPU:
        calls = 1
    else:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e6


def _each(value, change: Callable[[Tensor], Tensor]):
    """Return the tensors in it changed, the rest as it is."""
    if isinstance(value, dict):
        return {name: _each(member, change) for name, member in value.items()}
    if isinstance(value, list):
        return [_each(member, change) for member in value]
    return change(value) if isinstance(value, Tensor) else value


def _as_tuple(value: Tensor | tuple) -> tuple[Tensor, ...]:
    """Return the tensors of a result; of rows in float8, what they stand for."""
    if isinstance(value, Float8Rows):
        return (value.values.float() * value.scales,)
    return tuple(t for v in value for t in _as_tuple(v)) if isinstance(value, tuple) else (value,)


if __name__ == "__main__":
    sys.exit(main())
