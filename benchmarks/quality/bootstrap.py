"""Means with bootstrap intervals (Efron 1979, percentiles of resampled means)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean, the ends of its interval, and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int


def interval(
    values: np.ndarray,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return the mean of values (N,) and its interval; NaNs are left out.

    groups: (N,) labels. Values of one label belong together, as a scene drawn several times does, and are resampled
    together: otherwise the interval would be as narrow as if they were independent. NaN where no value is left.
    """
    values = np.asarray(values, np.float64)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    if len(groups) != len(values):
        raise ValueError(f"groups: {len(groups)} labels for {len(values)} values, expected one each")
    kept = ~np.isnan(values)
    values, groups = values[kept], groups[kept]
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    labels, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(labels), size=(resamples, len(labels)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, (tail, 100 - tail))
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def paired(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray | None = None, **options) -> Estimate:
    """Return the mean of the differences ours - theirs, each of one picture drawn both ways; see `interval`."""
    return interval(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64), groups, **options)
