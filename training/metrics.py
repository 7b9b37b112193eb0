"""How well a picture keeps to a condition, inside a mask and outside."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass
class EdgeError:
    """LFMSE, lower is nearer: against the condition inside the mask and outside, and outside against all ones.

    The last one is the original's measure of the free part: it falls as the model draws more edges there.
    """

    inside: float
    outside: float
    outside_ones: float


def edge_error(made: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> EdgeError:
    """Low-frequency mean squared error of two edge maps (H, W) uint8, by mask (H, W) in [0, 1], as in the original.

    Both are blurred (Gaussian 11 x 11, sigma 5) and reduced 8 times, so that an edge a few pixels off still counts as
    near. NaN where the mask leaves nothing to average.
    """
    maps = [cv2.GaussianBlur(e.astype(np.float32) / 255, (11, 11), 5) for e in (made, wanted)]
    size = mask.shape[1] // 8, mask.shape[0] // 8
    made, wanted, inside = (
        cv2.resize(m.astype(np.float32), size, interpolation=cv2.INTER_AREA) for m in (*maps, mask)
    )
    squared = (made - wanted) ** 2
    return EdgeError(_mean(squared, inside), _mean(squared, 1 - inside), _mean((made - 1) ** 2, 1 - inside))


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = float(weights.sum())
    return float((values * weights).sum()) / total if total > 0 else float("nan")
