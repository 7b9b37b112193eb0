"""The rows of a guidance batch: which pictures, and which half, what is made once belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def per_picture(rows: Tensor, pictures: int) -> Tensor:
    """Return one row for all pictures as it is, and otherwise one for each: those of each prompt are repeated."""
    return rows if len(rows) in (1, pictures) else rows.repeat_interleave(pictures // len(rows), dim=0)


def spread(items: Sequence[T], pictures: int) -> list[T]:
    """Return an item for each picture, of one for all, for each prompt, or for each picture; see `per_picture`."""
    return [items[i * len(items) // pictures] for i in range(pictures)]


def over_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return (rows, ...) of (B, ...): row i is row i % B, so that both halves of a guidance batch have the same."""
    count = len(tensor)
    if count == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor if count == rows else tensor.repeat(rows // count, *[1] * (tensor.ndim - 1))


def in_halves(unguided: Tensor, guided: Tensor, rows: int, images: int) -> Tensor:
    """Return the rows of a guidance batch, the last `images` of them guided, of what all have, (1, ...), or each."""
    return channels_last(torch.cat([over_rows(unguided, rows - images), over_rows(guided, images)]))


def channels_last(feature: Tensor) -> Tensor:
    return feature.contiguous(memory_format=torch.channels_last)
