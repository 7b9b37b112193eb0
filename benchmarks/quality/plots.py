"""Pictures of the figures: means with their intervals, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from benchmarks.measure import save_figure
from benchmarks.quality.bootstrap import Estimate
from runtime.control.png import save_png

matplotlib.use("agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which the colour-blind can tell apart
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#F0E442")
FIGURES = {  # name -> (title, whether more is better; None: what the free model does is best)
    "lfmse_inside": ("LFMSE inside: lower follows better", False),
    "f1": ("F1 of edges inside: higher follows better", True),
    "lfmse_outside_wanted": ("LFMSE outside to the condition: as without control is free", None),
    "leakage": ("leakage, grey levels: lower is more local", False),
}


def dots(table: Mapping[str, Mapping[str, Estimate]], path: Path) -> None:
    """Draw one panel for each of FIGURES: a row a variant, its mean and interval. table: variant -> figure ->
    estimate.
    """
    figure, axes = plt.subplots(
        1, len(FIGURES), figsize=(17, 0.8 + 0.33 * len(table)), layout="constrained", sharey=True
    )
    for axis, (name, (title, _)) in zip(axes, FIGURES.items(), strict=True):
        for y, row in enumerate(table.values()):
            if np.isfinite((e := row[name]).mean):
                axis.errorbar(
                    e.mean,
                    y,
                    xerr=[[e.mean - e.low], [e.high - e.mean]],
                    fmt="o",
                    color=PALETTE[0],
                    capsize=3,
                )
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(table)), table)
    axes[0].invert_yaxis()
    _save(figure, path)


def leakage_curves(curves: Mapping[str, Sequence[Estimate]], nearest: Sequence[int], path: Path) -> None:
    """Difference to the free picture by distance from the mask's border. curves: name -> one estimate a distance."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    labels = [f"{a}-{b}" for a, b in pairwise(nearest)] + [f"over {nearest[-1]}"]
    for colour, (name, estimates) in zip(PALETTE, curves.items(), strict=False):
        _band(axis, range(len(labels)), estimates, colour, name)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlabel("distance from the mask, px")
    axis.set_ylabel("difference to the free picture, grey levels")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    _save(figure, path)


def tradeoff(points: Sequence[Mapping], path: Path) -> None:
    """Leakage against LFMSE inside, a line a method over its strengths; see `ablation.tradeoff`."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for colour, variant in zip(PALETTE, dict.fromkeys(point["variant"] for point in points), strict=False):
        own = [point for point in points if point["variant"] == variant]
        x, y = ([point[f"{name}_mean"] for point in own] for name in ("lfmse_inside", "leakage"))
        axis.plot(x, y, "o-", color=colour, label=variant, markersize=4)
        for point, at in zip(own, zip(x, y, strict=True), strict=True):
            axis.annotate(f"{point['scale']:g}", at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set_xlabel("LFMSE inside: to the left follows better")
    axis.set_ylabel("leakage, grey levels")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, title="numbers: strength", title_fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def sweeps(rows: Sequence[Mapping], path: Path) -> None:
    """Panels of what `curves.sweep` measured: a row for each figure, a column for each field of the region."""
    fields, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("field", "figure"))
    size = (3.6 * len(fields), 2.6 * len(names))
    figure, axes = plt.subplots(
        len(names), len(fields), figsize=size, layout="constrained", sharey="row", squeeze=False
    )
    for line, name in zip(axes, names, strict=True):
        for axis, field in zip(line, fields, strict=True):
            points = [row for row in rows if row["field"] == field and row["figure"] == name]
            estimates = [
                Estimate(*(float(p[key]) for key in ("mean", "low", "high")), int(p["n"])) for p in points
            ]
            _band(axis, [float(p["value"]) for p in points], estimates, PALETTE[0])
            axis.grid(alpha=0.3)
        line[0].set_ylabel(name, fontsize=9)
    for axis, field in zip(axes[-1], fields, strict=True):
        axis.set_xlabel(field)
    _save(figure, path)


def sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], titles: Sequence[str], path: Path) -> None:
    """Pictures (H, W, 3) uint8 in a table: each row under its prompt, each column under its title."""
    height, width = rows[0][1][0].shape[:2]
    line, gap = 16, 6
    whole = Image.new(
        "RGB", (gap + len(titles) * (width + gap), line + len(rows) * (height + line + gap)), "white"
    )
    draw = ImageDraw.Draw(whole)
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), 2), title, "black")
    for i, (prompt, pictures) in enumerate(rows):
        top = line + i * (height + line + gap)
        draw.text((gap, top + 2), prompt, (110, 110, 110))
        for column, picture in enumerate(pictures):
            whole.paste(Image.fromarray(picture), (gap + column * (width + gap), top + line))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(whole, path)


def _band(axis, x, estimates: Sequence[Estimate], colour: str, label: str | None = None) -> None:
    """Draw the mean as a line, its interval as a band."""
    axis.plot(x, [e.mean for e in estimates], "o-", color=colour, label=label, markersize=4)
    axis.fill_between(
        x, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.2, linewidth=0
    )


def _save(figure, path: Path) -> None:
    save_figure(figure, path)
    plt.close(figure)
