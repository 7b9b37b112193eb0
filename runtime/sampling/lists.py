"""Lists of pictures in a request: one for each picture that is drawn, or for each prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.control.adapters import fit_channels
from runtime.control.images import unit
from runtime.control.region import Region
from runtime.errors import InputError


def check_count(count: int, name: str, prompts: int, images: int) -> None:
    """Raise InputError unless `count` pictures are none, one, or one for each of the prompts or the images."""
    if count not in (0, 1, prompts, images):
        expected = f"one for each of {images} pictures" if images > 1 else "one"
        if prompts not in (1, images):
            expected += f", or of {prompts} prompts"
        raise InputError(f"{name}: a list of {count}; expected {expected}")


def check_lists(region: Region, prompts: int, images: int, composed: bool) -> None:
    """Raise InputError where a region has another number of conditions or masks than there are images or prompts.

    composed: whether a prompt is several, which the rows of a list are not counted for.
    """
    for field in ("condition", "mask"):
        count, name = len(region.pictures(field)), f"{region.label} {field}"
        if count > 1 and composed:
            raise InputError(f"{name}: a list beside prompts joined by AND; expected one picture")
        check_count(count, name, prompts, images)


def batch(pictures: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Return named pictures (1, 1 | 3, H, W), uint8 or float32, as (N, 1 | 3, H, W).

    Raises InputError where one has another size than the first.
    """
    size = pictures[0][1].shape[2:]
    for name, pixels in pictures:
        if pixels.shape[2:] != size:
            (rows, columns), (height, width) = size, pixels.shape[2:]
            raise InputError(
                f"{name}: {width} x {height} px beside {columns} x {rows}; expected pictures of one size"
            )
    kinds = {(pixels.dtype, pixels.shape[1]) for _, pixels in pictures}
    if len(kinds) == 1:
        return torch.cat([pixels for _, pixels in pictures])
    colours = max(channels for _, channels in kinds)
    return torch.cat([fit_channels(unit(pixels), colours) for _, pixels in pictures])
