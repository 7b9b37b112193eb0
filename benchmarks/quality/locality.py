"""How local a control is, and how well its edges are kept, beyond the original's measures.

Pictures are (H, W, 3) uint8, maps of edges (H, W) uint8 (an edge where > 127), masks (H, W) in [0, 1], 1 where the
control acts. Distances are Euclidean, in pixels, from centre to centre. A figure is NaN where nothing is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import cv2
import numpy as np
from skimage.metrics import structural_similarity

SSIM_WINDOW = 11  # of a Gaussian of sigma 1.5 cut at 3.5 sigma (Wang et al. 2004)
BAND = 16  # px: the widest band along a border whose normals are still the border's


@dataclass(frozen=True)
class EdgeScores:
    """Shares in [0, 1]. precision: of the edges made, those wanted; recall: of those wanted, the ones made."""

    precision: float
    recall: float
    f1: float


def edge_scores(made: np.ndarray, wanted: np.ndarray, mask: np.ndarray, tolerance: float = 1.5) -> EdgeScores:
    """Return precision, recall and F1 of edge pixels inside the mask; one matches where the other map has an edge
    within `tolerance` px, anywhere.

    Precision is NaN where nothing was made, recall where nothing was wanted, f1 where either holds for both; f1 is 0
    where only one of them has edges, or none match.
    """
    made, wanted, inside = made > 127, wanted > 127, mask > 0.5
    precision = _share_near(made & inside, wanted, tolerance)
    recall = _share_near(wanted & inside, made, tolerance)
    if np.isnan(precision) and np.isnan(recall):
        return EdgeScores(precision, recall, float("nan"))
    both = np.nan_to_num(precision) + np.nan_to_num(recall)
    return EdgeScores(
        precision, recall, 2 * precision * recall / both if both and not np.isnan(precision * recall) else 0.0
    )


def _share_near(edges: np.ndarray, others: np.ndarray, tolerance: float) -> float:
    if not edges.any():
        return float("nan")
    return float((_distance_to(others)[edges] <= tolerance).mean())


def masked_ssim(made: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> float:
    """Structural similarity of two maps, averaged over the mask. Raises ValueError below 11 x 11 px."""
    if min(made.shape) < SSIM_WINDOW:
        raise ValueError(
            f"made: {made.shape[1]} x {made.shape[0]} px, expected {SSIM_WINDOW} x {SSIM_WINDOW} or more"
        )
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    _, similarity = structural_similarity(made, wanted, full=True, **options)
    return _mean(similarity, mask)


def leakage(image: np.ndarray, free: np.ndarray, mask: np.ndarray, bins: Sequence[float]) -> np.ndarray:
    """Return difference to the free picture of the same seed outside the mask, by distance to it: (len(bins) - 1,).

    Entry i is the mean absolute difference, in grey levels, over pixels bins[i] < distance <= bins[i + 1] from the
    nearest pixel of the mask.
    """
    difference, distance = _difference(image, free), _distance_to(mask > 0)
    rings = ((distance > near) & (distance <= far) for near, far in pairwise(bins))
    return np.array([_mean(difference, ring) for ring in rings])


def leakage_total(image: np.ndarray, free: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean over all pixels outside."""
    return _mean(_difference(image, free), mask == 0)


def seam(image: np.ndarray, free: np.ndarray, mask: np.ndarray, width: float = 4) -> float:
    """Return how visible the mask's border is: grey levels a pixel across it, beyond those of the free picture there.

    The mean size of the luminance's gradient along the border's normal, in the band within `width` px of it. Edges of
    what is drawn cross a border at any angle; a seam lies along it.
    """
    if not 0 < width <= BAND:
        raise ValueError(f"width {width}: expected above 0 and at most {BAND} px")
    inside = mask > 0.5
    if inside.all() or not inside.any():
        return float("nan")
    signed = _distance_to(inside) - _distance_to(~inside)
    normal = _gradient(signed)
    normal /= np.maximum(np.linalg.norm(normal, axis=0), 1e-6)
    band = np.abs(signed) <= width
    across = [np.abs((_gradient(_luminance(p)) * normal).sum(0))[band].mean() for p in (image, free)]
    return float(across[0] - across[1])


def diversity(images: Sequence[np.ndarray], mask: np.ndarray) -> float:
    """Return mean absolute difference outside the mask, in grey levels, over all pairs of pictures
    (of several seeds).
    """
    if len(images) < 2:
        raise ValueError(f"images: {len(images)}, expected 2 or more")
    return float(np.mean([_mean(_difference(a, b), mask == 0) for a, b in combinations(images, 2)]))


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.float64) - b).mean(2)


def _distance_to(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W) float64: of each pixel to the nearest one that is set, 0 on it; infinite where none is."""
    if not pixels.any():
        return np.full(pixels.shape, np.inf)
    return cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE).astype(
        np.float64
    )


def _gradient(values: np.ndarray) -> np.ndarray:
    """Return (2, H, W): kornia's Sobel, along x and y, a pixel."""
    options = {"ksize": 3, "scale": 1 / 8, "borderType": cv2.BORDER_REPLICATE}
    return np.stack([cv2.Sobel(values, cv2.CV_64F, *axis, **options) for axis in ((1, 0), (0, 1))])


def _luminance(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = float(weights.sum())
    return float((values * weights).sum()) / total if total > 0 else float("nan")
