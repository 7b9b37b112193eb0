"""The report of a run in Markdown, and the pictures of its sheet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.quality.bootstrap import Estimate
from benchmarks.quality.samples import Sample
from runtime.machine.files import replacing

MEANINGS = {  # figure -> (what it is, which way is better)
    "lfmse_inside": ("LFMSE to the condition inside the mask (the original's measure)", "lower"),
    "lfmse_outside": ("LFMSE to all ones outside (the original's)", "lower"),
    "lfmse_total": ("the sum of both (the original's)", "lower"),
    "lfmse_outside_wanted": ("LFMSE to the condition outside", "as without control"),
    "sobel_inside": ("the original's error of Sobel maps inside", "lower"),
    "sobel_outside": ("of Sobel maps to all ones outside", "lower"),
    "sobel_total": ("the sum of both", "lower"),
    "sobel_outside_wanted": ("of Sobel maps to the real picture's outside", "as without control"),
    "coincidence": ("DiffCC: share of the condition that is there", "higher"),
    "hallucinated_inside": ("DiffCC: share of the inside with edges not asked for", "lower"),
    "hallucinated_outside": ("DiffCC: share of the outside with edges", "as without control"),
    "precision": ("edges inside that were asked for, within 1.5 px", "higher"),
    "recall": ("edges asked for that are there, within 1.5 px", "higher"),
    "f1": ("edges inside: F1 of precision and recall within 1.5 px", "higher"),
    "ssim": ("SSIM of the picture's own condition to the one asked for, inside", "higher"),
    "leakage": ("difference to the free picture of the same seed outside, grey levels", "lower"),
    "injected_outside": ("control added to the UNet outside the mask, over inside, RMS", "0"),
    "seam": ("gradient across the mask's border, beyond the free picture's, grey levels a px", "0"),
    "perceptual": ("distance to the free picture outside, of the VAE's features, as LPIPS", "lower"),
    "colours": ("things asked for whose colour is shown", "higher"),
    "shapes": ("things asked for that are shown in shape and colour", "higher"),
    "background": ("pictures on the background asked for", "higher"),
    "diversity_outside": (
        "difference between pictures of several seeds outside, grey levels",
        "as without control",
    ),
    "diversity_inside": ("the same inside", "lower"),
    "fid": ("FID of the pictures to the real ones", "lower"),
    "clip_score": ("CLIPScore of picture and prompt", "higher"),
}


def write(
    path: Path,
    found: Mapping[str, Estimate],
    free: Mapping[str, Estimate],
    stamp: Mapping,
    pictures: int,
    curves: bool,
) -> None:
    """Write the table of all figures, and the pictures that lie beside it. free: figures of the pictures without
    control.
    """
    facts = ", ".join(f"{key} {value}" for key, value in stamp.items())
    lines = ["# How local the control is", "", f"{pictures} pictures; {facts}.", ""]
    lines += ["Means with bootstrap 95 % intervals over scenes; n is the number of values behind each.", ""]
    lines += ["| figure | with control | without | n | better | what it is |", "|---|---|---|---|---|---|"]
    for name, (meaning, better) in MEANINGS.items():
        if name in found:
            without = cell(free[name]) if name in free else ""
            lines.append(
                f"| {name} | {cell(found[name])} | {without} | {found[name].n} | {better} | {meaning} |"
            )
    lines += ["", "![difference to the free picture by distance from the mask](leakage.png)"]
    lines += ["", "![condition, with control, without control, difference](sheet.png)"]
    if curves:
        lines += ["", "![figures against scale, start and end](curves.png)"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n", "utf-8")


def cell(e: Estimate) -> str:
    """Return the mean, and its interval where it has one."""
    return number(e.mean) + (f" ({number(e.low)} to {number(e.high)})" if np.isfinite(e.low) else "")


def number(value: float) -> str:
    """Return three significant digits; no negative zero."""
    return f"{value + 0.0:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def strip(sample: Sample, image: np.ndarray, free: np.ndarray) -> list[np.ndarray]:
    """Return a sheet's row, each (H, W, 3) uint8: the condition lit inside the mask, both pictures, their difference x
    4.
    """
    inside = 0.25 + 0.75 * sample.mask[0].numpy()[..., None]
    condition = sample.condition.numpy().mean(0)[..., None] * np.ones(3)
    shown = np.clip(condition * inside + 0.15 * sample.mask[0].numpy()[..., None], 0, 1) * 255
    difference = np.abs(image.astype(int) - free.astype(int)) * 4
    return [shown.round().astype(np.uint8), image, free, difference.clip(0, 255).astype(np.uint8)]
