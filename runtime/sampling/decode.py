"""Latents to pictures."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from runtime.machine.finite import check_finite
from runtime.model.vae import unscaled, vae_factor

DECODE_PIXELS = 2**21  # decoded at once: two pictures of 1024 x 1024


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) -> pixels (B, 3, H, W) float32 in [0, 1], where the VAE is; a few images at a time.

    Raises InputError where a pixel is not finite.
    """
    latents = unscaled(latents, vae)
    area = latents.shape[2] * latents.shape[3] * vae_factor(vae) ** 2
    chunks = latents.to(vae.dtype).split(max(1, DECODE_PIXELS // area))
    pixels = torch.cat([vae.decode(chunk, return_dict=False)[0].float() for chunk in chunks])
    check_finite(pixels, "decode", vae.dtype)
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Return (B, 3, H, W) in [0, 1] as RGB pictures; from a GPU it is their bytes that are copied."""
    arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
