"""The sheet: one picture that shows what a run was asked for and what it made of it.

A row for each region: its condition, its mask over the condition. Beside them a row for each result: the image, its
edges, in one colour inside the masks and in another outside, and where the outside was held the difference to what it
was held to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from runtime.control.conditions import canny
from runtime.control.keyframes import written
from runtime.control.region import PackedRegion, union

Colour = tuple[int, int, int]
# Orange, sky blue and purple of Okabe and Ito's palette, which the colour-blind can tell apart.
INSIDE, OUTSIDE, OUTLINE = (230, 159, 0), (86, 180, 233), (224, 110, 190)
PAPER, INK, FAINT, NOTHING = (255, 255, 255), (30, 30, 30), (110, 110, 110), (225, 225, 225)
SMALLEST, LARGEST = 256, 512  # px, a panel's longer side
COLUMN = 240  # px, a column's width at least: room for the labels beside narrow pictures
MARGIN, GAP, LINE = 20, 16, 20
TITLE, CAPTION = 15, 13  # px, the fonts' sizes
PROMPT_LINES = 3
DIFFERENCE = 4  # times: a difference of a few grey levels cannot be seen


@dataclass(frozen=True)
class Panel:
    """A picture at the size it is shown, its title, and its legend: (colour of the swatch or None, text)."""

    picture: Image.Image
    title: str
    legend: Sequence[tuple[Colour | None, str]]


def make_sheet(
    images: Sequence[Image.Image],
    packed: Sequence[PackedRegion],
    prompt: str,
    seed: int,
    references: Sequence[Image.Image] = (),
) -> Image.Image:
    """Return the sheet of a run: `images` are its results, image i was made with `seed` + i; `packed` are its regions,
    all of one size with the images. references: where the outside was held, the picture each of them was held to."""
    width, height = images[0].size
    inside = union(packed, height, width)[0, 0].numpy() if packed else None
    numbers = [f" {i + 1}" if len(packed) > 1 else "" for i in range(len(packed))]
    asked = [_region_panels(*pair, images[0].size) for pair in zip(packed, numbers, strict=True)]
    made = [_result_panels(image, inside, seed + i) for i, image in enumerate(images)]
    if references:
        for row, image, reference in zip(made, images, references, strict=True):
            row.append(_difference_panel(image, reference, inside))
    return _lay_out([rows for rows in (asked, made) if rows], prompt)


def colour_edges(image: Image.Image, mask: np.ndarray | None) -> Image.Image:
    """Return the image's Canny edges on black: INSIDE where mask (H, W) > 0, OUTSIDE elsewhere; all OUTSIDE without."""
    edges = np.array(canny(image)) > 0
    inside = np.zeros_like(edges) if mask is None else mask > 0
    colours = np.where(inside[..., None], np.uint8(INSIDE), np.uint8(OUTSIDE))
    return Image.fromarray(colours * edges[..., None].astype(np.uint8))


def tint(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return the image as it is where mask (H, W) is 0, half INSIDE's colour where it is 1."""
    weight = mask[..., None] / 2
    mixed = np.array(image.convert("RGB")) * (1 - weight) + np.float32(INSIDE) * weight
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _region_panels(item: PackedRegion, number: str, size: tuple[int, int]) -> list[Panel]:
    region, condition = item.region, _to_image(item, size)
    mask = _mask(item, condition.height, condition.width)
    strength = f"{region.adapter}, scale {written(region.scale)}"
    if tuple(region.levels) != (1, 1, 1, 1):
        strength += ", levels " + ":".join(f"{level:g}" for level in region.levels)
    if region.uncond_scale != 1:
        strength += f", {region.uncond_scale:g} of it unguided"
    where = "acts here" if item.mask is not None else "no mask: acts everywhere"
    if isinstance(region.end, float) and (region.start, region.end) != (0, 1):
        where += f", steps {region.start:.0%} to {region.end:.0%}"
    elif region.end != 1:
        where += (
            f", steps from {region.start:.0%}" if region.start else ""
        ) + f", fading {written(region.end)}"
    legend = [] if item.condition is None else [(None, strength)]
    if region.prompt is not None:
        share = f" at {written(region.prompt_weight)}" if region.prompt_weight != 1 else ""
        legend.append((None, f'"{region.prompt}"{share}'))
    shown = "words" if item.condition is None else "condition"
    over = _outlined(_show(tint(condition, mask)), mask)
    return [
        Panel(_show(condition), f"{shown}{number}", legend),
        Panel(
            over,
            f"mask{number} over the condition" if item.condition is not None else f"mask{number}",
            [(INSIDE, where)],
        ),
    ]


def _result_panels(image: Image.Image, mask: np.ndarray | None, seed: int) -> list[Panel]:
    edges = colour_edges(image, mask)
    if max(image.size) > LARGEST:  # lines one pixel wide would fade when shrunk
        edges = edges.filter(ImageFilter.MaxFilter(3))
    shown, legend = _show(edges, Image.Resampling.NEAREST), [(OUTSIDE, "edges")]
    if mask is not None:
        shown = _outlined(shown, mask)
        legend = [(INSIDE, "inside"), (OUTSIDE, "outside the mask")]
    return [
        Panel(_show(image), f"result, {image.width} x {image.height} px", [(None, f"seed {seed}")]),
        Panel(shown, "edges of the result", legend),
    ]


def _difference_panel(image: Image.Image, reference: Image.Image, mask: np.ndarray | None) -> Panel:
    mask = np.zeros(image.size[::-1]) if mask is None else mask
    difference = np.abs(np.array(image).astype(int) - np.array(reference)).max(axis=2)
    shown = _show(Image.fromarray((difference * DIFFERENCE).clip(0, 255).astype(np.uint8)).convert("RGB"))
    said = f"{changed_outside(image, reference, mask)} pixels differ outside the mask"
    return Panel(_outlined(shown, mask), f"difference to the reference x {DIFFERENCE}", [(None, said)])


def changed_outside(image: Image.Image, reference: Image.Image, mask: np.ndarray) -> int:
    """Return how many pixels of two RGB pictures differ where the mask (H, W) is 0."""
    return int((np.array(image) != np.array(reference)).any(axis=2)[mask == 0].sum())


def _show(picture: Image.Image, shrinking: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Enlarged by a whole factor, or shrunk, until the longer side is within SMALLEST and LARGEST."""
    side = max(picture.size)
    if side > LARGEST:
        size = [max(1, round(length * LARGEST / side)) for length in picture.size]
        return picture.resize(size, shrinking)
    factor = math.ceil(SMALLEST / side)
    return picture.resize([length * factor for length in picture.size], Image.Resampling.NEAREST)


def _outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return the border of where mask (H, W) > 0, drawn on a picture of any size."""
    inside = cv2.resize((mask > 0).astype(np.uint8), picture.size, interpolation=cv2.INTER_NEAREST)
    border = inside - cv2.erode(inside, np.ones((3, 3), np.uint8))
    picture.paste(OUTLINE, mask=Image.fromarray(border * 255))
    return picture


def _lay_out(groups: list[list[list[Panel]]], prompt: str) -> Image.Image:
    """Groups of rows of panels side by side under the prompt, a group with fewer rows centred in the height."""
    fonts = {size: ImageFont.load_default(size) for size in (TITLE, CAPTION)}
    panels = [panel for rows in groups for row in rows for panel in row]
    column = max(COLUMN, *(panel.picture.width for panel in panels))
    row_height = max(panel.picture.height for panel in panels) + 2 * LINE
    columns, rows = sum(len(rows[0]) for rows in groups), max(map(len, groups))
    width = 2 * MARGIN + columns * column + (columns - 1) * GAP
    lines = _wrap(prompt, fonts[TITLE], width - 2 * MARGIN)
    top = MARGIN + (len(lines) * LINE + GAP if lines else 0)
    sheet = Image.new("RGB", (width, top + rows * row_height + (rows - 1) * GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + i * LINE), line, INK, fonts[TITLE])
    left = 0  # columns
    for group in groups:
        y = top + (rows - len(group)) * (row_height + GAP) // 2
        for r, row in enumerate(group):
            for c, panel in enumerate(row):
                x = MARGIN + (left + c) * (column + GAP)
                _draw_panel(sheet, panel, (x, y + r * (row_height + GAP)), column, fonts)
        left += len(group[0])
    return sheet


def _draw_panel(sheet: Image.Image, panel: Panel, corner: tuple[int, int], width: int, fonts: dict) -> None:
    draw, (x, y) = ImageDraw.Draw(sheet), corner
    draw.text((x, y), _shorten(panel.title, fonts[TITLE], width), INK, fonts[TITLE])
    y += LINE
    sheet.paste(panel.picture, (x, y))
    y += panel.picture.height + 4
    right = x + width
    for colour, text in panel.legend:
        if colour is not None:
            draw.rectangle((x, y + 2, x + 10, y + 12), colour)
            x += 16
        text = _shorten(text, fonts[CAPTION], right - x)
        draw.text((x, y), text, FAINT, fonts[CAPTION])
        x += math.ceil(fonts[CAPTION].getlength(text)) + 12


def _wrap(text: str, font, width: int) -> list[str]:
    """Return the text in at most PROMPT_LINES lines of `width` px, the last one shortened if need be."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (len(lines) == PROMPT_LINES or font.getlength(longer) <= width):
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shorten(line, font, width) for line in lines]


def _shorten(text: str, font, width: int) -> str:
    """Return the text in one line, cut with an ellipsis where it is wider than `width` px."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _mask(item: PackedRegion, height: int, width: int) -> np.ndarray:
    """Return (H, W) float32; ones where the region has no mask."""
    return np.ones((height, width), np.float32) if item.mask is None else item.mask[0, 0].numpy()


def _to_image(item: PackedRegion, size: tuple[int, int]) -> Image.Image:
    """Return a region's condition (1, C, H, W) in [0, 1], C = 1 or 3, as a picture; a grey one where it has none."""
    if item.condition is None:
        return Image.new("RGB", size, NOTHING)
    pixels = (item.condition[0] * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
