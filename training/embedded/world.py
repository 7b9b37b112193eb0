"""The embedded model's world: captioned scenes of coloured shapes on plain backgrounds, drawn from a seed.

8 shapes x 8 colours x 5 backgrounds, one to three objects a scene. Eight (shape, colour) pairs, one for each
shape and each colour, are held out: no training scene shows them, so they tell composing from remembering.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

COLOURS = {
    "red": (214, 39, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 220, 40),
    "green": (35, 155, 60),
    "cyan": (40, 200, 215),
    "blue": (40, 80, 215),
    "purple": (125, 45, 165),
    "pink": (245, 120, 185),
}

# name -> (phrase of the caption, colour at the top, colour at the bottom), all less saturated than any object
BACKGROUNDS = {
    "snow": ("on snow", (240, 244, 249), (214, 223, 236)),
    "night": ("at night", (10, 12, 34), (38, 38, 76)),
    "stone": ("on stone", (126, 126, 130), (92, 92, 98)),
    "sand": ("on sand", (226, 203, 160), (204, 176, 130)),
    "meadow": ("in a meadow", (158, 184, 130), (116, 148, 94)),
}

_SUPERSAMPLE = 4


def _polygon(points: int, radius: float = 1.0, turn: float = 0.0) -> np.ndarray:
    angle = turn + np.arange(points) * 2 * np.pi / points - np.pi / 2
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star() -> np.ndarray:
    points = np.empty((10, 2))
    points[0::2], points[1::2] = _polygon(5), _polygon(5, 0.45, np.pi / 5)
    return points


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], axis=1) / 16


def _cross() -> np.ndarray:
    a, b = 0.95, 0.33
    quarter = np.array([(b, -a), (b, -b), (a, -b)])
    turns = [
        quarter @ np.array([[np.cos(r), np.sin(r)], [-np.sin(r), np.cos(r)]])
        for r in np.arange(4) * np.pi / 2
    ]
    return np.concatenate(turns)


# contours inside the unit disc, filled by the even-odd rule (a ring is two circles)
SHAPES: dict[str, list[np.ndarray]] = {
    "circle": [_polygon(48, 0.92)],
    "square": [_polygon(4, 1.1, np.pi / 4)],
    "triangle": [_polygon(3, 1.08)],
    "diamond": [_polygon(4) * (0.72, 1.08)],
    "star": [_star() * 1.1],
    "heart": [_heart()],
    "ring": [_polygon(48), _polygon(48, 0.52)],
    "cross": [_cross()],
}

HELD_OUT = frozenset(
    (shape, colour)
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
    if (i + j) % len(COLOURS) == 3
)


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    x: float  # centre and radius as fractions of the image's side
    y: float
    radius: float
    turn: float  # radians


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    seed: int  # of the shading, which the caption does not mention

    @property
    def caption(self) -> str:
        phrases = [f"{'an' if t.colour == 'orange' else 'a'} {t.colour} {t.shape}" for t in self.things]
        listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
        return f"{listed} {BACKGROUNDS[self.background][0]}"


def sample_scene(seed: int, held_out: bool = False, things: tuple[int, int] = (1, 3)) -> Scene:
    """Scene number ``seed``: the same one every time. ``held_out``: the first object is a held-out pair,
    otherwise no object is. ``things``: fewest and most objects; they keep apart, in different colours."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(things[0], things[1] + 1))
    colours = list(rng.permutation(list(COLOURS)))
    placed: list[Thing] = []
    for _ in range(count * 20):
        if len(placed) == count:
            break
        colour, shape = str(colours[len(placed) % len(colours)]), str(rng.choice(list(SHAPES)))
        radius = float(rng.uniform(0.12, (0.3, 0.24, 0.2)[min(count, 3) - 1]))
        x, y = (float(rng.uniform(radius + 0.02, 0.98 - radius)) for _ in range(2))
        turn = float(rng.uniform(-0.3, 0.3))
        if any(np.hypot(x - t.x, y - t.y) < 0.9 * (radius + t.radius) for t in placed):
            continue
        wants_held_out = held_out and not placed
        if ((shape, colour) in HELD_OUT) != wants_held_out:
            shape = _other_shape(rng, colour, wants_held_out)
        placed.append(Thing(shape, colour, x, y, radius, turn))
    return Scene(tuple(placed), str(rng.choice(list(BACKGROUNDS))), seed)


def _other_shape(rng: np.random.Generator, colour: str, held_out: bool) -> str:
    return str(rng.choice([s for s in SHAPES if ((s, colour) in HELD_OUT) == held_out]))


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """Return the scene as (size, size, 3) uint8 RGB: antialiased shapes with a soft light on a shaded background."""
    rng = np.random.default_rng([scene.seed, 1])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    _, top, bottom = BACKGROUNDS[scene.background]
    wave = np.cos(2 * np.pi * (rng.uniform(0.5, 1.5) * x + rng.uniform(-0.5, 0.5) * y + rng.uniform()))
    blend = np.clip(y + 0.12 * wave + rng.uniform(-0.1, 0.1), 0, 1)[..., None]
    image = (1 - blend) * np.float32(top) + blend * np.float32(bottom)
    for thing in scene.things:
        share = coverage(thing, size)[..., None]
        light = 1 + 0.35 * ((thing.x - x) + (thing.y - y))[..., None]  # from the upper left
        tint = np.float32(COLOURS[thing.colour]) + rng.uniform(-8, 8, 3).astype(np.float32)
        image += share * (tint * light - image)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def coverage(thing: Thing, size: int) -> np.ndarray:
    """Return share of every pixel that the shape covers, (size, size) float32 in [0, 1]."""
    c, s = np.cos(thing.turn), np.sin(thing.turn)
    big, bits = size * _SUPERSAMPLE, 4  # fixed-point coordinates with 4 fractional bits
    contours = [
        np.round(
            ((p @ np.array([[c, s], [-s, c]])) * thing.radius + (thing.x, thing.y)) * big * 2**bits
            - 2 ** (bits - 1)
        )
        for p in SHAPES[thing.shape]
    ]
    canvas = np.zeros((big, big), np.uint8)
    cv2.fillPoly(canvas, [p.astype(np.int32) for p in contours], 255, shift=bits)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
