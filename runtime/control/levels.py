"""The four levels at which a control enters SDXL's UNet: its count, strides and sizes, defined here alone."""

from __future__ import annotations

from runtime.arguments import whole_number
from runtime.errors import InputError

STRIDES = (16, 16, 32, 32)  # pixels of a feature's side at each level, from the finest to the coarsest
COUNT = len(STRIDES)
MAX_SIDE = 2**14  # pixels: 16 times SDXL's own
SIZE_MULTIPLE = STRIDES[0]  # of a picture's sides: deeper levels round up, as in diffusers


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return (h, w) of each level's features for a picture of height x width pixels."""
    return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]


def picture_side(value: int, name: str) -> int:
    """Return a picture's side. Raises InputError unless it is a multiple of 16; says the nearest that are."""
    try:
        side = whole_number(value, name)
    except InputError:
        raise InputError(
            f"{name} {value!r}: expected pixels, a positive multiple of {SIZE_MULTIPLE}"
        ) from None
    if side > MAX_SIDE:
        raise InputError(f"{name} {side}: expected at most {MAX_SIDE} pixels")
    if side % SIZE_MULTIPLE:
        below = side // SIZE_MULTIPLE * SIZE_MULTIPLE
        nearest = f"{below} and {below + SIZE_MULTIPLE}" if below else f"{SIZE_MULTIPLE}"
        raise InputError(f"{name} {side}: not a multiple of {SIZE_MULTIPLE}; the nearest: {nearest}")
    return side
