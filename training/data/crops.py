"""Aspect-ratio buckets, and how an image, its condition and its mask are cut to them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]  # height, width in pixels


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """Return sizes of sides that are multiples of `step`, of at most `resolution`^2 pixels, each as large as it can
    be.
    """
    sizes = {(resolution, resolution)}
    for height in range(step, int(resolution * math.sqrt(max_aspect)) + 1, step):
        width = resolution**2 // height // step * step
        if width and max(height, width) / min(height, width) <= max_aspect:
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """Return the bucket of the nearest aspect ratio, the larger of equally near ones."""
    wanted = math.log(size[1] / size[0])
    return min(buckets, key=lambda b: (round(abs(math.log(b[1] / b[0]) - wanted), 9), -b[0] * b[1]))


@dataclass(frozen=True)
class Crop:
    """Resize to `scaled`, cut `bucket` out at (top, left), mirror where `flip`."""

    original: Size
    scaled: Size
    top: int
    left: int
    bucket: Size
    flip: bool

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's added ids: original size, crop's corner, target size.

        The corner of a mirrored crop is that in the mirrored image, as in diffusers' trainers, which mirror first.
        """
        right = self.scaled[1] - self.left - self.bucket[1]
        return (*self.original, self.top, right if self.flip else self.left, *self.bucket)

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """Crop the image itself, or of a condition or mask of its aspect ratio at any size."""
        scaled = image.resize((self.scaled[1], self.scaled[0]), resample)
        height, width = self.bucket
        cut = scaled.crop((self.left, self.top, self.left + width, self.top + height))
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else cut


def make_crop(size: Size, bucket: Size, key: str, variant: int, flip: bool) -> Crop:
    """Variant 0 is the centre; the others lie where (key, variant) says. Odd variants are mirrored where `flip`."""
    scale = max(b / s for b, s in zip(bucket, size, strict=True))
    scaled = tuple(max(b, round(s * scale)) for b, s in zip(bucket, size, strict=True))
    room = [s - b for s, b in zip(scaled, bucket, strict=True)]
    if variant == 0:
        top, left = (r // 2 for r in room)
    else:
        seed = int.from_bytes(hashlib.sha256(f"{key} {variant}".encode()).digest()[:8], "little")
        top, left = (int(x) for x in np.random.default_rng(seed).integers(0, room, endpoint=True))
    return Crop(size, scaled, top, left, bucket, flip and variant % 2 == 1)
