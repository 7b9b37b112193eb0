"""The four levels at which a control enters SDXL's UNet: its count, strides and sizes, defined here alone."""

from __future__ import annotations

STRIDES = (16, 16, 32, 32)  # pixels of a feature's side at each level, from the finest to the coarsest
COUNT = len(STRIDES)
SIZE_MULTIPLE = STRIDES[0]  # of a picture's sides: deeper levels round up, as in diffusers


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return (h, w) of each level's features for a picture of height x width pixels."""
    return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
