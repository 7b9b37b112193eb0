"""What is drawn to be measured: prompts, conditions and masks, of the embedded world or of a user's folder."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from runtime.control import images, masks
from runtime.control.conditions import preprocess
from runtime.errors import InputError
from training.config import TrainConfig
from training.data.masks import random_mask
from training.data.sources import open_source
from training.embedded.evaluate import held_out_scenes
from training.embedded.vae import SIZE
from training.embedded.world import Scene, render

RANDOM_MASKS = TrainConfig(
    mask_shapes=("box", "circle"), mask_count=1, mask_min_area=0.15, mask_soft=0.0, mask_full=0.0
)
MASK_KINDS = ("random", "centre", "half")


@dataclass(frozen=True)
class Sample:
    """One picture to draw. condition (1 or 3, H, W) and mask (1, H, W): float32 in [0, 1].

    number: of the scene or picture; the same one may come with several masks. picture: the real one, (H, W, 3) uint8,
    and scene: what it shows, where they are known.
    """

    number: int
    prompt: str
    condition: Tensor
    mask: Tensor
    mask_kind: str
    picture: np.ndarray | None = None
    scene: Scene | None = None


def held_out_samples(
    count: int, kinds: Sequence[str] = MASK_KINDS, condition: str = "canny"
) -> Iterator[Sample]:
    """Yield scenes of the embedded world that no training has seen, each with every kind of mask."""
    for i, scene in enumerate(held_out_scenes(count)):
        picture = render(scene, SIZE)
        shown = _condition(condition, Image.fromarray(picture))
        for kind in kinds:
            yield Sample(i, scene.caption, shown, make_mask(kind, i, SIZE, SIZE), kind, picture, scene)


def folder_samples(
    folder: str,
    size: int,
    count: int,
    kinds: Sequence[str],
    *,
    condition: str = "canny",
    conditions: str | None = None,
    masks_from: str | None = None,
) -> Iterator[Sample]:
    """Yield pictures of a folder, `name.txt` with the prompt beside each, cropped to `size` x `size` pixels.

    conditions: a folder of ready conditions under the pictures' names; otherwise they are computed from the pictures.
    masks_from: one of masks, white = control; otherwise the `kinds` are made. Raises InputError, naming the file.
    """
    source = open_source(TrainConfig(data=folder, condition_from=conditions, mask_from=masks_from, out=""))
    for i, file in islice(source.read(), count):
        if file.error or file.caption is None:
            raise InputError(f"{folder}: {file.name}: {file.error or 'no prompt beside it; expected a .txt'}")
        picture = _square(_read(file.image, file.name), size)
        if file.condition is None:
            shown = _condition(condition, picture)
        else:
            shown = images.to_tensor(_square(_read(file.condition, f"condition of {file.name}"), size))[0]
        real = np.asarray(picture.convert("RGB"))
        if file.mask is not None:
            painted = _square(_read(file.mask, f"mask of {file.name}").convert("L"), size)
            yield Sample(i, file.caption, shown, images.to_tensor(painted)[0], "painted", real)
            continue
        for kind in kinds:
            yield Sample(i, file.caption, shown, make_mask(kind, i, size, size), kind, real)


def make_mask(kind: str, number: int, height: int, width: int) -> Tensor:
    """Return (1, H, W): "random" follows from the number; "centre" is the original's, half of each side; "half" the
    left.
    """
    if kind == "centre":
        return masks.box(height, width, (width // 4, height // 4, width - width // 4, height - height // 4))[
            0
        ]
    if kind == "half":
        return masks.box(height, width, (0, 0, width // 2, height))[0]
    return random_mask(np.random.default_rng([7, number]), height, width, RANDOM_MASKS)[0]


def _condition(name: str, picture: Image.Image) -> Tensor:
    return images.to_tensor(preprocess(name, picture))[0]


def _read(data: bytes, name: str) -> Image.Image:
    try:
        return images.load_image(Image.open(io.BytesIO(data)), name)
    except OSError as error:
        raise InputError(f"{name}: no picture: {error}") from error


def _square(picture: Image.Image, size: int) -> Image.Image:
    """Return the largest square from the middle, by area average."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    array = np.asarray(picture)[top : top + side, left : left + side]
    return Image.fromarray(cv2.resize(array, (size, size), interpolation=cv2.INTER_AREA))
