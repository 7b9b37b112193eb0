"""python -m benchmarks.kernels [--batch 1 4 16] [--dtype bf16] [--out benchmarks/results/<device>/kernels.csv]

Times every kernel at SDXL's shapes against plain PyTorch, torch.compile and kornia, on the same tensors, the L2 cache
emptied before every run. A provider is timed only once its output has been found right. The share is of the copy
bandwidth of this device, measured in the same run: what a kernel that moves the least bytes there are would reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton.testing
from torch import Tensor

from benchmarks.kernel_cases import Case, cases, geglu_case, guidance_case, inject_case, loss_case, norm_case
from benchmarks.measure import environment, results_folder, write_rows
from kernels import reference
from runtime.machine.arithmetic import DTYPES

COPY_BYTES = 1 << 30
ERROR = 2e-2  # relative, of a result that is right but was rounded after every operation


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 4, 16], help="images (guidance doubles the rows)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(
            "a CUDA device is needed: on a CPU the kernels only run interpreted, which says nothing of speed"
        )
    device, dtype = torch.device("cuda"), DTYPES[args.dtype]
    torch.manual_seed(0)
    rows, bandwidth = [], copy_bandwidth(device)
    for case in [*cases(device, dtype, args.batch), *beyond_l2(device, dtype)]:
        new = time_case(case, bandwidth, args.dtype)
        print("\n".join(map(_line, new)))
        rows += new
        write_rows(args.out or results_folder() / "kernels.csv", rows)


def beyond_l2(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Return sizes that no cache holds, at which only bandwidth counts: some 200 to 400 MB each."""
    return [
        inject_case(device, dtype, 32, 640, 64),
        loss_case("sobel_z0_loss", device, dtype, 512, 128),
        norm_case(device, dtype, 32, 320, 128),
        geglu_case(device, dtype, 64 * 1024, 2560),
        guidance_case(device, dtype, 256, 128),
    ]


def time_case(case: Case, bandwidth: float, dtype: str) -> list[dict]:
    """Return a row for each provider and direction. Raises RuntimeError where a provider's output is wrong."""
    rows = []
    expected = _as_tuple(getattr(reference, case.op)(**_double(case.inputs)))
    for name, run in case.providers().items():
        check(f"{case.op} {case.shape} {name}", _as_tuple(run(**case.inputs)), expected)
        what = {"op": case.op, "shape": case.shape, "dtype": dtype, "provider": name}
        figures = time_run(partial(run, **case.inputs), case.bytes_moved, bandwidth)
        rows.append(what | {"direction": "forward"} | figures)
        if case.differentiable:
            figures = time_run(with_backward(case, run), None, bandwidth)
            rows.append(what | {"direction": "forward+backward"} | figures)
    return [row | environment() | {"triton": triton.__version__} for row in rows]


def time_run(run: Callable, moved: int | None, bandwidth: float) -> dict[str, str]:
    """Microseconds, and where the bytes that it has to move are known the rate it moves them at."""
    low, middle, high = (f"{ms * 1e3:.2f}" for ms in triton.testing.do_bench(run, quantiles=[0.2, 0.5, 0.8]))
    rate = None if moved is None else moved / (float(middle) / 1e6)
    return {
        "p20_us": low,
        "p50_us": middle,
        "p80_us": high,
        "gb_s": "" if rate is None else f"{rate / 1e9:.0f}",
        "share_of_copy": "" if rate is None else f"{rate / bandwidth:.3f}",
        "peak_mib": _peak(run),
    }


def check(name: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """RuntimeError where an output is further from the reference than roundings explain."""
    for a, e in zip(actual, expected, strict=True):
        error = ((a.double() - e).norm() / e.norm().clamp_min(1e-30)).item()
        if not error <= ERROR:
            raise RuntimeError(f"{name}: relative error {error:.1e}: it is not timed")


def with_backward(case: Case, run: Callable) -> Callable[[], object]:
    inputs = dict(case.inputs)
    leaves = []
    for name in case.differentiable:
        value = inputs[name]
        copies = [
            t.detach().clone().requires_grad_() for t in (value if isinstance(value, list) else [value])
        ]
        inputs[name] = copies if isinstance(value, list) else copies[0]
        leaves += copies
    grads = [torch.ones_like(out) for out in _as_tuple(run(**inputs))]
    return lambda: torch.autograd.grad(_as_tuple(run(**inputs)), leaves, grads)


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes a second of a copy in device memory, reading and writing counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (
        2 * COPY_BYTES / (triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)
    )


def _peak(run: Callable) -> str:
    """Return MiB allocated during a run, beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def _double(inputs: dict) -> dict:
    def convert(value):
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value.double() if isinstance(value, Tensor) else value

    return {name: convert(value) for name, value in inputs.items()}


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _line(row: dict) -> str:
    share = f"{float(row['share_of_copy']):5.0%} of copy" if row["share_of_copy"] else ""
    return f"{row['op']:18} {row['shape']:18} {row['direction']:17} {row['provider']:8} {row['p50_us']:>10} us {share}"


if __name__ == "__main__":
    main()
