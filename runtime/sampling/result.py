"""What a request becomes: pictures, and what made them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from runtime.sampling.held import Reference
from runtime.sampling.pixels import to_images

OUTPUT = {
    "pil": to_images,
    "pt": lambda pixels: pixels.cpu(),
    "np": lambda pixels: pixels.permute(0, 2, 3, 1).cpu().numpy(),
}


@dataclass
class Result:
    """Pictures, and what made them.

    images: PIL, RGB; where another output_type was asked for, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1],
    or none. latents: (B, C, h, w) float32, what was decoded. timings: seconds of each stage that was run (encode, text,
    reference, adapter, denoise, decode) and "total". seed: of the first image, image i has seed + i; a given
    generator's own. region_steps: the steps, from 0, in which each region acts. reference: where the outside was held,
    what it was held to; the next call takes it.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    latents: Tensor
    timings: dict[str, float]
    seed: int
    region_steps: list[list[int]] = field(default_factory=list)
    reference: Reference | None = None
