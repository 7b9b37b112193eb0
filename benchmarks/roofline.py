"""python -m benchmarks.roofline [--out folder] [--full-size]

Where the time of a denoising step goes, and the least it could take: each operation of the UNet timed by itself, its
arithmetic over the machine's best matrix product or its bytes over its copying rate, whichever takes longer, summed by
kind of operation. The embedded model in fp32, and in bf16 on a CPU that is quick in it, one and eight guided pictures;
--full-size adds SDXL's UNet of random weights at 512 x 512 (20 GB of memory in bf16). Writes <out>/roofline.csv and
roofline.png.

Timing each operation alone adds some microseconds to each, which the sum over the kinds shows against "step".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import matplotlib
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import full_size
from benchmarks.measure import (
    check_counts,
    check_out,
    default_dtypes,
    environment,
    interleave,
    matmul_rate,
    results_folder,
    save_figure,
    weighted_flops,
    write_rows,
)
from runtime.cli.command import Parser, exit_code
from runtime.loading.load import load_model
from runtime.loading.single_file import SDXL_CONFIGS
from runtime.machine.arithmetic import DTYPES, half_precision, name_of
from runtime.model.unet import UNet
from runtime.optimize.fused_qkv import fuse_qkv
from runtime.optimize.packed import pack_weights, packs_here

matplotlib.use("agg")
from matplotlib import pyplot as plt

KINDS = {  # kind -> parts of the operations' names
    "convolution": ("conv",),
    "linear": ("mm", "linear"),
    "attention": ("attention", "attend"),
    "normalisation": ("norm",),
    "pointwise": ("silu", "gelu", "geglu", "add", "mul", "inject"),
    "copies": ("cat", "clone", "copy", "upsample", "_to_copy", "reorder"),
}
OTHER = "other"
CPU = torch.device("cpu")
ATTEND = torch.ops.localcontrol.attend  # attention as one operation, whichever it is made of
WEIGHTED = ("aten::conv2d", "aten::linear", "mkldnn::_linear_pointwise", "mkldnn::_convolution_pointwise")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.roofline", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--full-size", action="store_true", help="SDXL's UNet too, random weights")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps (default 15)")
    parser.add_argument("--out", type=Path, default=results_folder(), help="default %(default)s")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    """Measure every case, write, plot."""
    check_out(options.out)
    check_counts(repeats=options.repeats)
    rows = []
    for dtype in default_dtypes(CPU):
        for pictures in (1, 8):
            name = f"embedded, {dtype}, {pictures} guided"
            rows += measure(name, embedded_step(dtype, 2 * pictures), DTYPES[dtype], options.repeats)
    if options.full_size:
        dtype = half_precision(CPU)
        name = f"SDXL, {name_of(dtype)}, {full_size.PIXELS} px, 1 row"
        rows += measure(name, full_size_step(dtype), dtype, max(1, options.repeats // 5))
    write_rows(options.out / "roofline.csv", rows)
    plot(rows, options.out / "roofline.png")


def embedded_step(dtype: str, rows: int) -> Callable[[], Tensor]:
    """Return a step of the embedded UNet at its own size, without control."""
    unet = fuse_qkv(load_model("embedded", dtype=DTYPES[dtype]).unet)
    config = unet.config
    if packs_here(DTYPES[dtype], CPU):
        pack_weights(unet)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    time = unet.embed_time(torch.tensor([500.0]), torch.randn(rows, pooled), torch.full((rows, 6), 128.0))
    text = unet.project_text(torch.randn(rows, 77, config.cross_attention_dim, dtype=DTYPES[dtype]))
    sample, time = torch.randn(rows, config.in_channels, 16, 16, dtype=DTYPES[dtype]), [t[0] for t in time]
    return lambda: unet(sample, time, text)


def full_size_step(dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a forward of SDXL's UNet, its weights packed where a pipeline would, with control."""
    config = json.loads((SDXL_CONFIGS / "unet" / "config.json").read_text())
    unet = UNet.from_diffusers(full_size.build(config, dtype))
    fuse_qkv(unet)
    given, control = full_size.make_inputs(unet.config, dtype)
    if packs_here(dtype, CPU):
        pack_weights(unet)
    time = [t[0] for t in unet.embed_time(given["timesteps"], given["pooled"], given["time_ids"])]
    text = unet.project_text(given["text"])
    return lambda: unet(given["sample"], time, text, control)


def measure(name: str, step: Callable[[], Tensor], dtype: torch.dtype, repeats: int) -> list[dict]:
    """Return a row for each kind of operation, and one for the step as it is."""
    whole = statistics.median(interleave({name: step}, repeats)[name])
    turns = []
    for _ in range(repeats + 1):
        with Timed() as timed, mock.patch("runtime.model.attention._attend", ATTEND):
            step()
        turns.append(timed.operations)
    operations = [
        (kind, statistics.median(turn[i][1] for turn in turns[1:]), work, moved)
        for i, (kind, _, work, moved) in enumerate(turns[0])
    ]
    peak, copying = matmul_rate(dtype, CPU) * 1e12, copy_rate(operations)
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0, 0.0])
    for kind, seconds, work, moved in operations:
        found = (1, seconds, work, moved, max(work / peak, moved / copying))
        sums[kind] = [a + b for a, b in zip(sums[kind], found, strict=True)]
    total = [sum(column) for column in zip(*sums.values(), strict=True)]
    sums["step"] = [total[0], whole, *total[2:]]
    machine = {"peak_tflops": round(peak / 1e12, 3), "copy_gb_s": round(copying / 1e9, 1)}
    rows = [
        row_of(name, kind, sums[kind]) | machine | environment()
        for kind in (*KINDS, OTHER, "step")
        if kind in sums
    ]
    for row in rows:
        print(f"{name:32} {row['kind']:14} {row['ms']:9.3f} ms, at least {row['floor_ms']:9.3f}", flush=True)
    return rows


def row_of(name: str, kind: str, figures: list[float]) -> dict:
    calls, seconds, work, moved, floor = figures
    return {
        "case": name,
        "kind": kind,
        "calls": calls,
        "ms": round(seconds * 1e3, 4),
        "floor_ms": round(floor * 1e3, 4),
        "gflop": round(work / 1e9, 4),
        "mib": round(moved / 2**20, 3),
    }


class Timed(TorchDispatchMode):
    """Notes each operation that is not a view: its kind, seconds, floating-point operations, bytes in and out."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[str, float, int, int]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        start = time.perf_counter()
        result = operation(*args, **kwargs)
        seconds = time.perf_counter() - start
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.itemsize for t in tensors)
            self.operations.append(
                (kind_of(operation), seconds, work_of(operation, args, kwargs, result), moved)
            )
        return result


def kind_of(operation) -> str:
    name = operation._schema.name.partition("::")[2]
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def work_of(operation, args, kwargs, result) -> int:
    """Return floating-point operations of matrix products and convolutions; 0 of all others."""
    name = operation._schema.name
    if name in WEIGHTED:
        return weighted_flops(args[0].shape, args[1].shape, out_shape=result.shape)
    if kind_of(operation) == "attention":
        query, key, value = args[:3]
        return 2 * query.numel() * key.shape[2] + 2 * query.shape[:3].numel() * key.shape[2] * value.shape[3]
    count = flop_registry.get(operation.overloadpacket)
    return count(*args, **kwargs, out_val=result) if count else 0


def copy_rate(operations: list[tuple[str, float, int, int]]) -> float:
    """Return bytes read and written a second by a copy that moves as much as the step's operations do on average.

    A small model's tensors stay in the cache: main memory's rate would not be the least time.
    """
    mean = sum(moved for *_, moved in operations) / len(operations)
    source = torch.ones(max(1024, int(mean // 8)))
    target = torch.empty_like(source)
    seconds = min(interleave({"copy": lambda: target.copy_(source)}, 200)["copy"])
    return 2 * source.numel() * source.itemsize / seconds


def plot(rows: list[dict], path: Path) -> None:
    """Draw a panel for each case: measured time of each kind, and the least it could take."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(
        1, len(cases), figsize=(3.4 * len(cases), 3.4), layout="constrained", squeeze=False
    )
    for panel, case in zip(panels[0], cases, strict=True):
        own = [row for row in rows if row["case"] == case][::-1]
        names = [row["kind"] for row in own]
        panel.barh(names, [row["ms"] for row in own], color="#56B4E9", label="measured")
        panel.barh(names, [row["floor_ms"] for row in own], height=0.35, color="#D55E00", label="at least")
        step = own[0]
        panel.set_title(f"{case}\n{step['floor_ms'] / step['ms']:.0%} of the step is the least", fontsize=9)
        panel.set_xlabel("ms")
        if panel is not panels[0][0]:
            panel.set_yticklabels([])
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
