"""Random masks: where the control acts in one training sample."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from runtime.control.masks import box, circle, feather, strokes
from training.config import TrainConfig

MOST_STROKES = 20  # for each square of the image: enough to fill any share that is asked for in practice


def random_mask(rng: np.random.Generator, height: int, width: int, config: TrainConfig) -> Tensor:
    """Return (1, 1, height, width) float32 in [0, 1]: one to `mask_count` shapes, or sometimes the whole image.

    Shapes together cover `mask_min_area` of the image at least. A share `mask_soft` has soft edges, up to an eighth
    of the shorter side wide, inwards only.
    """
    if rng.random() < config.mask_full:
        return torch.ones(1, 1, height, width)
    mask = torch.zeros(1, 1, height, width)
    for _ in range(int(rng.integers(1, config.mask_count, endpoint=True))):
        draw = SHAPES[config.mask_shapes[int(rng.integers(len(config.mask_shapes)))]]
        mask = torch.maximum(mask, draw(rng, height, width, config.mask_min_area))
    if rng.random() < config.mask_soft:
        mask = feather(mask, float(rng.uniform(1, max(2, min(height, width) / 8))))
    return mask


def segment_mask(rng: np.random.Generator, labels: Tensor, config: TrainConfig) -> Tensor:
    """Return (1, 1, H, W) float32 of a label image (1, 1, H, W): the pixels of one to `mask_count` of its labels.

    Labels smaller than `mask_min_area` are passed over while there are larger ones.
    """
    if rng.random() < config.mask_full:
        return torch.ones(labels.shape)
    values, counts = labels.unique(return_counts=True)
    large = counts >= config.mask_min_area * labels.numel()
    values = values[large] if large.any() else values[counts.argmax()][None]
    most = min(config.mask_count, len(values))
    chosen = rng.choice(len(values), size=int(rng.integers(1, most, endpoint=True)), replace=False)
    return torch.isin(labels, values[torch.from_numpy(chosen)]).float()


def _box(rng: np.random.Generator, height: int, width: int, least: float) -> Tensor:
    w = int(rng.integers(max(1, math.ceil(least * width)), width, endpoint=True))
    h = int(rng.integers(max(1, math.ceil(least * height * width / w)), height, endpoint=True))
    return _place(rng, height, width, h, w)


def _square(rng: np.random.Generator, height: int, width: int, least: float) -> Tensor:
    most = min(height, width)
    side = int(
        rng.integers(min(max(1, math.ceil(math.sqrt(least * height * width))), most), most, endpoint=True)
    )
    return _place(rng, height, width, side, side)


def _place(rng: np.random.Generator, height: int, width: int, h: int, w: int) -> Tensor:
    x, y = (int(rng.integers(0, room, endpoint=True)) for room in (width - w, height - h))
    return box(height, width, (x, y, x + w, y + h))


def _circle(rng: np.random.Generator, height: int, width: int, least: float) -> Tensor:
    """Whole circles; where none is large enough, the largest one."""
    most = min(height, width) / 2
    radius = float(rng.uniform(min(max(1.0, math.sqrt(least * height * width / math.pi) + 1), most), most))
    centre = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    return circle(height, width, centre, radius)


def _strokes(rng: np.random.Generator, height: int, width: int, least: float) -> Tensor:
    """Free-form: brush strokes that wander from anywhere, until they cover enough."""
    mask, side = torch.zeros(1, 1, height, width), min(height, width)
    for _ in range(MOST_STROKES * math.ceil(max(height, width) / side)):
        points = [rng.uniform((0, 0), (width, height))]
        heading = rng.uniform(0, 2 * math.pi)
        for _ in range(int(rng.integers(2, 8))):
            heading += rng.normal(0, 0.8)
            step = rng.uniform(0.1, 0.3) * side * np.array([math.cos(heading), math.sin(heading)])
            points.append(np.clip(points[-1] + step, 0, (width, height)))
        stroke = strokes(height, width, [tuple(p) for p in points], float(rng.uniform(0.06, 0.2)) * side)
        mask = torch.maximum(mask, stroke)
        if mask.mean() >= least:
            break
    return mask


SHAPES = {"box": _box, "square": _square, "circle": _circle, "strokes": _strokes}
