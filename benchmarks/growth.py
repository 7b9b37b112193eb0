"""python -m benchmarks.growth [--model embedded] [--engine folder] [--steps 30] [--out folder]

How the cost of a picture grows with its size, with the batch and with the number of regions: time, all points of an
axis in turn, and the peak memory of a process of its own for each point. Writes <out>/growth.csv and growth.png, with
the straight line that fits each axis best.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

from benchmarks.measure import (
    check_counts,
    check_out,
    environment,
    interleave,
    percentiles,
    results_folder,
    save_figure,
    write_rows,
)
from runtime import LocalControlPipeline, Region
from runtime.cli.command import Parser, exit_code
from runtime.control.masks import box
from runtime.engines.manifest import read_manifest
from runtime.machine.report import peak_memory

matplotlib.use("agg")
from matplotlib import pyplot as plt

PROMPT = "a yellow star and a blue circle at night"
# axis -> its points; sizes in halves of the model's own: 64 to 256 px of the embedded one, 512 to 2048 of SDXL
AXES = {"size": (1, 2, 3, 4), "batch": (1, 2, 4, 8), "regions": (0, 1, 2, 4, 8)}
LABELS = {"size": "pixels of a picture, thousands", "batch": "pictures", "regions": "regions"}


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.growth", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--model", default="embedded", help="what runtime.generate's --model takes")
    parser.add_argument("--engine", metavar="FOLDER", help="run on engines of export.build_engine")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as for runtime.generate")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results_folder(), help="default %(default)s")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure every point, fit, write."""
    check_out(options.out)
    check_counts(steps=options.steps, repeats=options.repeats)
    pipe, rows = load(options), []
    what = {
        "model": model_of(options),
        "engine": options.engine or "",
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    for axis, values in AXES.items():
        runs = {value: partial(draw, pipe, axis, value, options.steps) for value in values}
        times = interleave(runs, options.repeats)
        points = [work(pipe, axis, value) for value in values]
        slope, constant = np.polyfit(points, [percentiles(times[v])["p50_ms"] for v in values], 1)
        for value, point in zip(values, points, strict=True):
            fit = {"fit_ms": round(constant + slope * point, 2), "ms_each": round(slope, 4)}
            row = {"axis": axis, "value": value, "work": point, **percentiles(times[value]), **fit}
            row["peak_memory_mib"] = round(in_own_process(options, axis, value) / 2**20)
            rows.append({**row, **what, "steps": options.steps, **environment()})
            print(f"{axis} {value}: {row['p50_ms']:.1f} ms, {row['peak_memory_mib']} MiB", flush=True)
    write_rows(options.out / "growth.csv", rows)
    plot(rows, options.out / "growth.png")


def model_of(options: argparse.Namespace) -> str:
    """Return what is drawn with: of an engine the model that it was built from. Warns of options that it puts out of
    use.
    """
    if not options.engine:
        return options.model
    source = read_manifest(options.engine).model["source"]
    for name, value, usual in (("model", options.model, source), ("dtype", options.dtype, None)):
        if value not in (usual, "embedded"):
            warnings.warn(f"{name} {value}: not used, engine {options.engine} has its own", stacklevel=2)
    return source


def load(options: argparse.Namespace) -> LocalControlPipeline:
    if options.engine:
        return LocalControlPipeline.from_engine(options.engine)
    return LocalControlPipeline.from_pretrained(options.model, dtype=options.dtype)


def draw(pipe: LocalControlPipeline, axis: str, value: int, steps: int) -> None:
    """Draw once; what is not on the axis is one picture of the model's own size with one region."""
    side = pipe.default_size * value // 2 if axis == "size" else pipe.default_size
    regions = [make_region(side, i) for i in range(value if axis == "regions" else 1)]
    count = value if axis == "batch" else 1
    pipe(PROMPT, regions, height=side, width=side, steps=steps, seed=0, images_per_prompt=count)


def make_region(side: int, seed: int) -> Region:
    """Sparse edges, other ones for every region, each in a vertical strip."""
    generator = torch.Generator().manual_seed(seed)
    condition = (torch.rand(1, 1, side, side, generator=generator) > 0.95).float()
    left = seed % 8 * side // 8
    return Region(condition, mask=box(side, side, (left, 0, left + side // 8, side)))


def work(pipe: LocalControlPipeline, axis: str, value: int) -> float:
    """Return a point's place on its axis: thousands of pixels, pictures, regions."""
    return (pipe.default_size * value // 2) ** 2 / 1000 if axis == "size" else value


def in_own_process(options: argparse.Namespace, axis: str, value: int) -> int:
    """Return peak memory, in bytes, of a fresh process that draws once: loading and libraries included.

    Of a fork server: a process that is started in another way inherits this one's peak.
    """
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(_peak, (options, axis, value))


def _peak(options: argparse.Namespace, axis: str, value: int) -> int:
    pipe = load(options)
    draw(pipe, axis, value, min(options.steps, 2))
    peak = peak_memory(pipe.device)
    return peak.get("gpu") or peak["ram"]


def plot(rows: list[dict], path: Path) -> None:
    """Draw a panel for each axis: measured times with p20 and p80, the line that fits, and memory on the right."""
    figure, axes = plt.subplots(1, len(AXES), figsize=(13, 3.6), layout="constrained")
    for panel, axis in zip(axes, AXES, strict=True):
        own = [row for row in rows if row["axis"] == axis]
        x, y = ([row[key] for row in own] for key in ("work", "p50_ms"))
        ends = [[abs(row[f"p{p}_ms"] - row["p50_ms"]) for row in own] for p in (20, 80)]
        panel.errorbar(x, y, yerr=ends, fmt="o", color="#0072B2", capsize=3, label="time")
        panel.plot(x, [row["fit_ms"] for row in own], color="#0072B2", alpha=0.5, label="line")
        panel.set(xlabel=LABELS[axis], ylabel="ms a call", title=f"{own[0]['ms_each']:.3g} ms each")
        panel.set_ylim(0, 1.15 * max(y))
        memory = panel.twinx()
        memory.plot(x, [row["peak_memory_mib"] for row in own], "s--", color="#E69F00", markersize=4)
        memory.set_ylabel("peak memory, MiB", color="#E69F00")
        memory.set_ylim(0, 1.15 * max(row["peak_memory_mib"] for row in own))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
