"""A picture of benchmarks.latency: a panel for each dtype, batch and size; ours in stages, others whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from benchmarks.measure import save_figure

matplotlib.use("agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which the colour-blind can tell apart
STAGES = {"text": "#56B4E9", "adapter": "#E69F00", "denoise": "#0072B2", "decode": "#009E73"}
WHOLE = "#999999"


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """rows: of `latency.measure`."""
    keys = list(dict.fromkeys((row["dtype"], row["batch"], row["size"]) for row in rows))
    most = max(sum((row["dtype"], row["batch"], row["size"]) == key for row in rows) for key in keys)
    figure, axes = plt.subplots(
        len(keys), 1, figsize=(9, len(keys) * (0.9 + 0.3 * most)), layout="constrained", squeeze=False
    )
    for axis, key in zip(axes[:, 0], keys, strict=True):
        panel(axis, [row for row in rows if (row["dtype"], row["batch"], row["size"]) == key])
        axis.set_title(f"{key[0]}, {key[1]} at {key[2]} x {key[2]} px", fontsize=9, loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (*STAGES.values(), WHOLE)]
    figure.legend(handles, [*STAGES, "not told"], loc="outside upper center", ncols=5, fontsize=8)
    axes[-1, 0].set_xlabel("ms a call, median")
    save_figure(figure, path)
    plt.close(figure)


def panel(axis, rows: Sequence[Mapping]) -> None:
    """Draw a bar for each runtime, its stages side by side; in grey what they leave of the whole, or the whole of
    others.
    """
    for y, row in enumerate(rows):
        left = 0.0
        for stage, colour in STAGES.items():
            width = float(row[f"{stage}_ms"] or 0)
            axis.barh(y, width, left=left, color=colour)
            left += width
        whole = float(row["p50_ms"])
        axis.barh(y, max(0.0, whole - left), left=left, color=WHOLE)
        axis.text(max(whole, left), y, f" {whole:,.0f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row["runtime"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.1)
