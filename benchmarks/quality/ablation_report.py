"""The ablation in Markdown: every variant's figures, and what differs from masked features alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.quality.bootstrap import Estimate
from benchmarks.quality.report import MEANINGS, cell, number
from runtime.machine.files import replacing


def write_report(
    path: Path,
    overall: Mapping[str, Mapping[str, Estimate]],
    by_mask: Sequence[Mapping],
    against: Sequence[Mapping],
    pictures: int,
    base: str,
    stamp: Mapping,
) -> None:
    """overall: variant -> figure -> estimate over all masks. pictures: a variant's. by_mask and against: the lines of
    `ablation.table` and `ablation.differences`."""
    names = list(dict.fromkeys(row["figure"] for row in against)) or ["lfmse_inside"]
    facts = ", ".join(f"{key} {value}" for key, value in stamp.items())
    lines = ["# Ablation on the embedded world", "", f"{pictures} pictures a variant; {facts}.", ""]
    lines += ["Means with 95 % bootstrap intervals over scenes, over all masks, with and without prompt.", ""]
    lines += [f"- `{name}`: {MEANINGS[name][0]}; better: {MEANINGS[name][1]}." for name in names]
    lines += ["", "| variant | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for variant, found in overall.items():
        lines.append(f"| {variant} | " + " | ".join(cell(found[name]) for name in names) + " |")
    lines += ["", "![the same, drawn](ablation.png)", ""]
    lines += _by_mask(by_mask, "lfmse_inside")
    lines += [
        f"## Against {base}",
        "",
        "Picture by picture: the same scene, mask, seed and training seed. A difference is not clear where its "
        "interval holds 0 or the training seeds disagree on its sign.",
        "",
    ]
    lines += [
        "| variant | figure | difference | 95 % interval | each training seed | |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_difference(row) for row in against]
    lines += ["", "![leakage by distance](leakage.png)"]
    lines += ["", "Leakage against how closely the control is followed, at several strengths:"]
    lines += ["", "![leakage against following](tradeoff.png)"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n", "utf-8")


def _by_mask(rows: Sequence[Mapping], figure: str) -> list[str]:
    """Return a table of one figure: a row a variant, a column a kind of mask, with and without prompt."""
    found = {(row["variant"], _where(row)): row for row in rows if row["figure"] == figure}
    variants, columns = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    lines = [f"`{figure}` by mask:", "", "| variant | " + " | ".join(columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for variant in variants:
        cells = (
            cell(Estimate(*(found[variant, c][k] for k in ("mean", "low", "high", "n")))) for c in columns
        )
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _where(row: Mapping) -> str:
    return row["mask"] + ("" if row["prompt"] == "yes" else ", no prompt")


def _difference(row: Mapping) -> str:
    """Return one line; a difference counts where its interval leaves 0 out and all training seeds agree on its sign."""
    seeds = [float(value) for value in row["seeds"].split()]
    agree = all(value > 0 for value in seeds) or all(value < 0 for value in seeds)
    counts = agree and (row["low"] > 0 or row["high"] < 0)
    said = ("higher" if row["mean"] > 0 else "lower") if counts else "not clear"
    interval = f"{number(row['low'])} to {number(row['high'])}"
    each = ", ".join(map(number, seeds))
    return f"| {row['variant']} | {row['figure']} | {number(row['mean'])} | {interval} | {each} | {said} |"
