"""Masks: where a control acts. Painted, loaded, feathered, and resized to the levels of the UNet.

A mask is a float32 tensor (1, 1, H, W) in [0, 1]: 1 (white) where the control acts, 0 (black) where the model
is free. Coordinates are in pixels, x to the right and y down from the top left corner; the pixel in row i and
column j has its centre at x = j + 0.5, y = i + 0.5.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.control.images import fit, load_layers, strips
from runtime.errors import InputError

RESIZES = ("area", "nearest")  # how a mask comes to the size of a level
FAINT = 0.25  # a mask whose brightest value is below is likely one of labels, 0 and 1 of 255
BLACK = 16 / 255  # what a compressed picture makes of black, or of one colour
MOST_COLOURS = 256  # of what was painted, or of a palette: more are a photograph's
HALFTONES = 0.5  # a share of greys between black and white that photographs have, and masks have not
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's convert("L")


def read_mask(source, name: str = "mask") -> Tensor:
    """Return (1, 1, H0, W0) float32 of any source that `images.load_image` takes, at its own size.

    A grey picture is the mask itself. Of a coloured one (a segmentation, a red brush) all that is not black counts as
    white. A layer painted in one colour counts by its opacity, and of a photograph the part that was erased. Two values
    that are both dark, such as 0 and 1 of 255, are black and white. Warns (UserWarning) where a mask may mean another
    thing: one that is faint everywhere, or a photograph.
    """
    colour, alpha = load_layers(source, name)
    if alpha is None or all(bool((a == 1).all()) for a in strips(alpha)):
        mask = _strength(lambda: strips(colour), name)
    else:
        mask = _of_layer(lambda: strips(colour), lambda: strips(alpha), name)
    largest = mask.max().item()
    if 0 < largest < FAINT:
        if (mask == 0).logical_or(mask == largest).all():
            return (mask > 0).float()
        warnings.warn(
            f"{name}: its brightest value is {largest * 255:.0f} of 255, so the control is faint; expected white, 255",
            stacklevel=2,
        )
    return mask


Strips = Callable[[], Iterator[Tensor]]  # of a picture, (1, C, h, W) float32 each, from the top


def _strength(colour: Strips, name: str) -> Tensor:
    """Return (1, 1, H, W) float32 of colours, C = 1 or 3."""
    if _is_grey(_pixels(colour)):
        return _joined(c[:, :1] for c in colour())
    if _colours(_pixels(colour)) <= MOST_COLOURS:
        return _joined((c.amax(dim=1, keepdim=True) > BLACK).float() for c in colour())
    warnings.warn(
        f"{name}: a picture in colour, taken by its brightness; expected black and white", stacklevel=3
    )
    weights = torch.tensor(LUMINANCE, dtype=torch.float64)  # in float32 white would not be exactly 1
    grey = (torch.einsum("bchw,c->bhw", c.double(), weights)[:, None] for c in colour())
    return _joined(g.float() for g in grey)


def _of_layer(colour: Strips, alpha: Strips, name: str) -> Tensor:
    """Return (1, 1, H, W) of a picture with transparency, three colours and an alpha."""
    most = max(a.max() for a in alpha())

    def visible() -> Iterator[Tensor]:
        """Yield what is half as opaque as anything is: below, colours are what rounding left of them."""
        return (c.movedim(1, -1)[(a[:, 0] > 0) & (a[:, 0] >= most / 2)] for c, a in layers())

    def layers() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(colour(), alpha(), strict=True)

    first = next((p[0] for p in visible() if len(p)), None)
    if first is None or all(_is_near(c, first, a / most) for c, a in layers()):
        return _joined(alpha())
    if not _is_grey(visible()) and _colours(visible()) > MOST_COLOURS:
        return _joined(1 - a for a in alpha())
    if _is_grey(visible()) and _middling(visible()) > HALFTONES:
        warnings.warn(
            f"{name}: a grey picture with transparency, taken by its brightness; expected black and white, or one "
            "colour on a transparent layer",
            stacklevel=3,
        )
    return _strength(lambda: (c * a for c, a in layers()), name)


def _pixels(colour: Strips) -> Iterator[Tensor]:
    """Yield colours (N, C) in [0, 1], some rows at a time."""
    return (c.movedim(1, -1).reshape(-1, c.shape[1]) for c in colour())


def _joined(rows: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(rows), dim=2)


def _is_near(colour: Tensor, other: Tensor, opacity: Tensor) -> bool:
    """Return whether colours (1, 3, H, W) are another (3,), each as far as it is seen.

    Programs that keep colours multiplied by their alpha, browsers among them, leave little of a faint pixel's.
    """
    return bool(((colour - other[:, None, None]).abs() * opacity).max() <= BLACK)


def _middling(pixels: Iterator[Tensor]) -> float:
    """Return the share of grey pixels that are neither black nor white."""
    found = [(len(p), int(((p[:, 0] > BLACK) & (p[:, 0] < 1 - BLACK)).sum())) for p in pixels]
    return sum(between for _, between in found) / max(sum(count for count, _ in found), 1)


def _is_grey(pixels: Iterator[Tensor]) -> bool:
    return all(bool((p.amax(dim=1) - p.amin(dim=1)).max() <= BLACK) for p in pixels if len(p))


def _colours(pixels: Iterator[Tensor]) -> int:
    """Return how many 8-bit colours there are; not all of them are counted where they are more than MOST_COLOURS."""
    found = torch.empty(0, dtype=torch.int32)
    for p in pixels:
        levels = (p * 255).round().int()
        found = torch.cat([found, levels[:, 0] * 65536 + levels[:, 1] * 256 + levels[:, 2]]).unique()
        if len(found) > MOST_COLOURS:
            break
    return len(found)


def load_mask(source, height: int, width: int, name: str = "mask") -> Tensor:
    """Return (1, 1, height, width) float32, resized by area average; warns if the aspect ratio differs.

    Raises:
        InputError: as `images.load_image`.
    """
    return fit(read_mask(source, name), height, width, name, mode="area")


def mask_pyramid(mask: Tensor, sizes: Sequence[tuple[int, int]], mode: str = "area") -> list[Tensor]:
    """Return the mask (B, 1, H, W) at the size (h, w) of every level of the UNet.

    "area" averages each cell's own footprint: a cell that the mask does not touch is exactly 0, one that it
    fills is exactly 1. The footprints are those of the adapter's and the UNet's features, whose strides are
    powers of two and whose sizes round up: at H = 1040 the stride of 32 gives 33 cells, of which the last has
    16 rows. Sizes that no such stride gives are cut evenly. "nearest" takes one pixel a cell, as the original
    method does.
    """
    if mode == "nearest":
        return [F.interpolate(mask, tuple(size), mode="nearest") for size in sizes]
    if mode != "area":
        raise InputError(f"mask mode {mode!r} is unknown; expected {' or '.join(RESIZES)}")
    return [_average_cells(mask, *size) for size in sizes]


def box(height: int, width: int, corners: tuple[float, float, float, float]) -> Tensor:
    """1 where a pixel's centre lies in x0 <= x < x1, y0 <= y < y1; `corners` is (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = _finite(corners, 4, "box")
    if not (x0 < x1 and y0 < y1):
        raise InputError(f"mask box {corners} is empty; expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1")
    x, y = _centres(height, width)
    return ((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).float()[None, None]


def circle(height: int, width: int, centre: tuple[float, float], radius: float) -> Tensor:
    """1 where a pixel's centre is at most `radius` from `centre` = (cx, cy)."""
    cx, cy, radius = _finite((*centre, radius), 3, "circle")
    if radius <= 0:
        raise InputError(f"mask circle radius {radius:g}; expected more than 0")
    x, y = _centres(height, width)
    return ((x - cx) ** 2 + (y - cy) ** 2 <= radius**2).float()[None, None]


def strokes(height: int, width: int, points: Sequence[tuple[float, float]], thickness: float) -> Tensor:
    """Return a brush stroke, `thickness` px wide with round ends, through `points` [(x, y), ...]; one is a dot."""
    path = [_finite(point, 2, "stroke") for point in points]
    (thickness,) = _finite((thickness,), 1, "stroke thickness")
    if not path or thickness <= 0:
        raise InputError(f"mask stroke: {len(path)} points, {thickness:g} px; expected a point and a width")
    x, y = _centres(height, width)
    mask = torch.zeros(height, width, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(path, path[1:] or path, strict=False):
        dx, dy = x1 - x0, y1 - y0
        along = (((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-12)).clamp(0, 1)
        mask |= (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2 <= (thickness / 2) ** 2
    return mask.float()[None, None]


def feather(mask: Tensor, radius: float) -> Tensor:
    """Soften the edge of masks (B, 1, H, W) over `radius` px, inwards only.

    The mask is multiplied by a ramp that rises from 0 at the region's edge to 1 at `radius` px inside. So the
    region never grows, pixels outside it stay exactly 0, and values stay in [0, 1]; what is thinner than
    twice the radius no longer reaches 1 (paint it larger). The picture's own border is not an edge.
    """
    (radius,) = _finite((radius,), 1, "feather radius")
    if radius < 0:
        raise InputError(f"mask feather radius {radius:g}; expected 0 or more")
    return torch.cat([_feather(one, radius) for one in mask.split(1)]) if radius else mask


def _feather(mask: Tensor, radius: float) -> Tensor:
    inside = (mask[0, 0] > 0).to(torch.uint8).cpu().numpy()
    if inside.all():
        return mask
    # To the nearest pixel outside, centre to centre: the edge itself is half a pixel nearer.
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # The square is a whole number. OpenCV's last bit depends on where its buffers lie: rounding gives the same bits
    # in every run.
    distance = torch.from_numpy(np.sqrt(np.rint(np.square(distance, dtype=np.float64))))
    return mask * ((distance - 0.5) / radius).clamp(0, 1).to(mask)


def _average_cells(mask: Tensor, height: int, width: int) -> Tensor:
    strides = [_stride(pixels, cells) for pixels, cells in zip(mask.shape[-2:], (height, width), strict=True)]
    if None in strides:
        return F.interpolate(mask, (height, width), mode="area")
    return F.avg_pool2d(mask, strides, ceil_mode=True)


def _stride(pixels: int, cells: int) -> int | None:
    """Return the power of two of which `cells` are needed to cover `pixels`; None if there is none."""
    stride = 1
    while -(-pixels // stride) > cells:
        stride *= 2
    return stride if -(-pixels // stride) == cells else None


def _centres(height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5


def _finite(values: Sequence[float], count: int, name: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise InputError(f"mask {name} {values!r}; expected {count} finite number{'s'[: count > 1]}")
    return numbers
