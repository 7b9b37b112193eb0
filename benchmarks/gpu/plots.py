"""python -m benchmarks.gpu.plots [FOLDER]

Pictures of a run of benchmarks.gpu: <folder>/stages.png, ours beside diffusers', and <folder>/kernels.png, each kernel
beside what it replaces.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from benchmarks.gpu.summary import rows_of
from benchmarks.measure import results_folder, save_figure

matplotlib.use("agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which the colour-blind can tell apart
SIDES = {"ours": "#0072B2", "diffusers": "#E69F00"}
PROVIDERS = {
    "eager": "#E69F00",
    "kornia": "#CC79A7",
    "compile": "#56B4E9",
    "ours": "#0072B2",
    "ours, tuned": "#009E73",
}
FLOOR = "#444444"


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    draw(Path(given[0]) if given else results_folder())
    return 0


def draw(folder: Path) -> None:
    """Draw what there are rows of; failures and what was not timed are left out."""
    stages = [row for row in rows_of(folder / "stages.csv") if row["p50_ms"]]
    kernels = [row for row in rows_of(folder / "kernels.csv") if row["p50_us"]]
    if stages:
        _save(_stages(stages), folder / "stages.png")
    if kernels:
        _save(_kernels(kernels), folder / "kernels.png")


def _stages(rows: Sequence[Mapping[str, str]]):
    """Return a panel for each stage, a bar for each case, and a mark where its arithmetic alone would end."""
    names = list(dict.fromkeys(row["stage"] for row in rows))
    counts = [sum(row["stage"] == name for row in rows) for name in names]
    figure, axes = plt.subplots(
        len(names), 1, figsize=(9, 0.7 * len(names) + 0.32 * len(rows)), height_ratios=[n + 1 for n in counts],
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, name in zip(axes[:, 0], names, strict=True):
        found = [row for row in rows if row["stage"] == name]
        for y, row in enumerate(found):
            time, side = float(row["p50_ms"]), row["side"].partition(",")[0]
            axis.barh(y, time, color=SIDES.get(side, FLOOR))
            axis.text(time, y, f" {time:,.0f}" if time >= 100 else f" {time:.1f}", va="center", fontsize=8)
            if row["floor_ms"]:
                axis.plot([float(row["floor_ms"])] * 2, [y - 0.4, y + 0.4], color=FLOOR)
        axis.set_yticks(range(len(found)), [_short(row["case"], name) for row in found], fontsize=8)
        axis.set_title(f"{name}, {found[0]['size']} x {found[0]['size']} px", fontsize=9, loc="left")
        axis.invert_yaxis()
        axis.margins(x=0.1)
    axes[-1, 0].set_xlabel(f"ms, median; mark: arithmetic alone. {_device(rows)}", fontsize=8)
    return figure


def _kernels(rows: Sequence[Mapping[str, str]]):
    """Return a line for each call, a point for each way to compute it."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    cases = list(dict.fromkeys((row["op"], row["shape"], row["direction"]) for row in rows))
    cases.sort(key=lambda case: ops.index(case[0]))
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.22 * len(cases)), layout="constrained")
    for provider, colour in PROVIDERS.items():
        found = [row for row in rows if row["provider"] == provider]
        at = [cases.index((row["op"], row["shape"], row["direction"])) for row in found]
        times = [float(row["p50_us"]) for row in found]
        if found:
            axis.plot(times, at, "o", color=colour, label=provider, markersize=5)
    axis.set_yticks(
        range(len(cases)),
        [f"{op} {shape}{', with backward' * ('+' in way)}" for op, shape, way in cases],
        fontsize=7,
    )
    axis.set_xscale("log")
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    axis.set_xlabel(f"us a call on the device, {rows[0]['dtype']}. {_device(rows)}", fontsize=8)
    return figure


def _short(case: str, stage: str) -> str:
    """Return a case's name without its stage, which is the panel's title."""
    return case.removeprefix(f"{stage}, ").removeprefix("vae decode, ").removeprefix("training step, ")


def _device(rows: Sequence[Mapping[str, str]]) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['device']}, torch {rows[0]['torch']}, commits {commits}"


def _save(figure, path: Path) -> None:
    save_figure(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
