"""How well a picture keeps to a condition, inside a mask and outside: the measures of the original method.

Equal in value to metrics/lfmse.py and metrics/diffcc.py of github imatge-upc/localized-diffusion, but for what the
docstrings say. All take what was made and what was wanted, (H, W) uint8, and a mask (H, W) in [0, 1] or bool, 1 where
control acts; the mask is rounded to 8 bits, as the original has it. A pixel of a soft mask, neither 0 nor 1, counts as
inside and as outside. A figure is NaN where there is nothing to average.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass
class LFMSE:
    """Low-frequency mean squared error, lower is nearer.

    inside: against the condition. outside: against all ones, the original's measure of the free part, which falls as
    the model draws more edges there. total: their sum. outside_wanted: ours, outside against the condition itself; low
    where the free part follows the control.
    """

    inside: float
    outside: float
    total: float
    outside_wanted: float


@dataclass
class DiffCC:
    """Shares of the reduced pixels, in [0, 1].

    coincidence: of the wanted pixels inside, those at least as strong in what was made. hallucinated_inside: of those
    inside, the ones stronger than wanted. hallucinated_outside: of those outside, the ones with any edge.
    """

    coincidence: float
    hallucinated_inside: float
    hallucinated_outside: float


def lfmse_canny(made: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> LFMSE:
    """Return the error of thin lines: blurred and reduced 8 times first, so that an edge a few pixels off still counts
    as near.
    """
    made, wanted, mask = _low_frequency(made) / 255, _low_frequency(wanted) / 255, _reduced_mask(mask)
    return _lfmse(made, np.where(mask > 0, wanted, 0), wanted, mask)


def lfmse_sobel(made: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> LFMSE:
    """Return the error of broad edges: at full resolution without a blur, despite the name, each map divided by its
    maximum.

    The condition's maximum is the one inside the mask, but for `outside_wanted` the one of the whole map. A map of
    zeros stays zeros; the original divides by 0 and leaves the picture out. The original also counts the pixels
    inside as outside where its mask is uint8, since 1 - 255 wraps to 2; here they are apart, as with its float masks.
    """
    mask = _eight_bits(mask)
    controlled = np.where(mask > 0, wanted, 0)
    return _lfmse(_scaled(made), _scaled(controlled), _scaled(wanted), mask)


def diffcc(made: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> DiffCC:
    """Return which pixels have edges, both maps blurred and reduced 8 times: of those asked for, and of those not."""
    made, wanted, mask = _low_frequency(made), _low_frequency(wanted), _reduced_mask(mask)
    inside, outside = mask > 0, mask < 255
    return DiffCC(
        coincidence=_mean(made >= wanted, inside & (wanted > 0)),
        hallucinated_inside=_mean(made > wanted, inside),
        hallucinated_outside=_mean(made > 0, outside),
    )


def _lfmse(made: np.ndarray, controlled: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> LFMSE:
    """Return the error of maps in [0, 1] and an 8-bit mask; `controlled` is the condition inside the mask and 0
    elsewhere.
    """
    inside, outside = mask > 0, mask < 255
    error_inside = _mean((made - controlled) ** 2, inside)
    error_outside = _mean((made - (controlled + 1)) ** 2, outside)
    error_wanted = _mean((made - wanted) ** 2, outside)
    return LFMSE(error_inside, error_outside, error_inside + error_outside, error_wanted)


def _low_frequency(edges: np.ndarray) -> np.ndarray:
    """Return (H, W) uint8 -> (H // 8, W // 8) uint8; 8 bits all along, as in the original: rounding
    decides what is 0.
    """
    height, width = edges.shape
    return cv2.resize(cv2.GaussianBlur(edges, (11, 11), 5), (width // 8, height // 8))


def _reduced_mask(mask: np.ndarray) -> np.ndarray:
    """Return (H, W) in [0, 1] -> (H // 8, W // 8) uint8."""
    height, width = mask.shape
    return cv2.resize(_eight_bits(mask), (width // 8, height // 8), interpolation=cv2.INTER_NEAREST)


def _eight_bits(mask: np.ndarray) -> np.ndarray:
    return np.rint(mask.astype(np.float32) * 255).astype(np.uint8)


def _scaled(edges: np.ndarray) -> np.ndarray:
    return edges / max(int(edges.max()), 1)


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean()) if where.any() else float("nan")
