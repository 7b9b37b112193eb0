"""Plots of the committed figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

from runtime.files import replacing

# Okabe and Ito's palette, which the colour-blind can tell apart
PALETTE = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def plot_presets(rows: list[dict], curves: Mapping[str, Mapping[str, list]], path: Path) -> None:
    """Edge errors of every preset, a dot a seed, and the smoothed losses of the first seed."""
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    colours = dict(zip(presets, PALETTE, strict=False))
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    measures = {
        "edge_error_inside": "inside the mask, against the condition",
        "edge_error_outside": "outside, against the condition",
    }
    for axis, (name, title) in zip(axes, measures.items(), strict=False):
        for i, preset in enumerate(presets):
            values = [float(row[name]) for row in rows if row["preset"] == preset]
            axis.barh(i, np.mean(values), color=colours[preset])
            axis.plot(values, [i] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(presets)), presets)
        axis.invert_yaxis()
        axis.set_title(f"edge error (LFMSE) {title}", fontsize=9)
    first = rows[1]["seed"]
    for axis, (tag, title) in zip(
        axes[2:], {"loss/noise": "noise loss", "loss/z0": "z0 loss, weighted"}.items(), strict=True
    ):
        for preset in presets[1:]:
            points = np.array(curves[f"{preset} {first}"].get(tag, []))
            if len(points):
                axis.plot(points[:, 0], smooth(points[:, 1]), color=colours[preset], label=preset)
        axis.set_title(f"{title}, trailing mean, first seed", fontsize=9)
        axis.set_xlabel("step")
        axis.set_yscale("log" if tag == "loss/z0" else "linear")
        axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def smooth(values: np.ndarray, window: int = 8) -> np.ndarray:
    """Trailing mean."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    starts = np.maximum(0, np.arange(len(values)) + 1 - window)
    ends = np.arange(len(values)) + 1
    return (sums[ends] - sums[starts]) / (ends - starts)
