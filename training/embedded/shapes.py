"""Which shapes of the embedded world a picture shows: pixels of one colour, compared with each shape's outline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from training.embedded.evaluate import BACKGROUND_SHARE, COLOUR_SHARE, NAMES, colour_map
from training.embedded.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, coverage

SIDE = 48  # px of the pictures that outlines are compared at
TURNS = np.linspace(-0.3, 0.3, 7)  # radians: as far as the world turns a shape
LEAST_OVERLAP = 0.7  # intersection over union: below it, a spot of colour is not a known shape


@dataclass(frozen=True)
class Shown:
    """A spot of one colour. shape: None where it is like none. area: its share of the picture."""

    shape: str | None
    colour: str
    area: float


@dataclass(frozen=True)
class Adherence:
    """What of a caption is shown. colours: the share of its things whose colour is; shapes: in shape and colour."""

    colours: float
    shapes: float
    background: bool


def shown_shapes(image: np.ndarray) -> list[Shown]:
    """Return the spots of colour in (H, W, 3) uint8 ``image`` that are large enough to be things."""
    return _spots(colour_map(image))


def _spots(colours: np.ndarray) -> list[Shown]:
    found = []
    for number, colour in enumerate(COLOURS):
        spots, labels, stats, _ = cv2.connectedComponentsWithStats((colours == number).astype(np.uint8))
        for spot in range(1, spots):
            area = stats[spot, cv2.CC_STAT_AREA] / colours.size
            if area >= COLOUR_SHARE:
                found.append(Shown(_shape(labels == spot), colour, float(area)))
    return found


def adherence(image: np.ndarray, scene: Scene) -> Adherence:
    """Return how much of the scene's caption ``image`` (H, W, 3) uint8 shows."""
    colours = colour_map(image)
    found = _spots(colours)
    pairs, there = {(s.shape, s.colour) for s in found}, {s.colour for s in found}
    shares = {name: float(np.mean(colours == NAMES.index(name))) for name in BACKGROUNDS}
    background = max(shares, key=shares.__getitem__)
    return Adherence(
        colours=float(np.mean([thing.colour in there for thing in scene.things])),
        shapes=float(np.mean([(thing.shape, thing.colour) in pairs for thing in scene.things])),
        background=background == scene.background and shares[background] >= BACKGROUND_SHARE,
    )


def _shape(spot: np.ndarray) -> str | None:
    """Return the shape whose outline covers the spot (H, W) bool best."""
    names, outlines = _outlines()
    framed = _framed(spot.astype(np.float32)) > 0.5
    overlap = (outlines & framed).sum((1, 2)) / (outlines | framed).sum((1, 2))
    best = int(overlap.argmax())
    return names[best] if overlap[best] >= LEAST_OVERLAP else None


@cache
def _outlines() -> tuple[list[str], np.ndarray]:
    """Return every shape at every turn: names (N,), and their pictures (N, SIDE, SIDE) bool."""
    things = [Thing(shape, "red", 0.5, 0.5, 0.3, float(turn)) for shape in SHAPES for turn in TURNS]
    return [t.shape for t in things], np.stack([_framed(coverage(t, 128)) > 0.5 for t in things])


def _framed(spot: np.ndarray) -> np.ndarray:
    """Return (SIDE, SIDE) of the square around the spot (H, W): size and place no longer matter, proportions do."""
    rows, columns = (np.flatnonzero((spot > 0.5).any(axis)) for axis in (1, 0))
    top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    side = max(height, width)
    square = np.zeros((side, side), np.float32)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = spot[top : top + height, left : left + width]
    return cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR)
