"""Pictures to latents and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from PIL import Image
from torch import Tensor

from runtime.control.rows import over_rows, per_picture, spread
from runtime.machine.finite import check_finite
from runtime.model.vae import scaled, unscaled, vae_factor

DECODE_PIXELS = 2**21  # decoded at once: two pictures of 1024 x 1024


def encode(vae: AutoencoderKL, pixels: Tensor, generators: Sequence[torch.Generator], count: int) -> Tensor:
    """Return latents (count, C, h, w) float32 of pixels (N, 3, H, W) in [0, 1], one drawn for each image.

    N is 1, or divides count. generators: one for each image, or one for all; each draws from the VAE's posterior, as
    diffusers' pipelines do. A VAE without one (AutoencoderTiny) has one answer. Raises InputError where a latent is not
    finite.
    """
    encoded = [vae.encode((2 * one - 1).to(vae.dtype)) for one in pixels.split(1)]
    if len(generators) > 1:
        drawn = [_draw(*pair) for pair in zip(spread(encoded, count), generators, strict=True)]
    else:
        drawn = [_draw(row, generators[0]) for row in encoded]
    latents = torch.cat(drawn).float()
    check_finite(latents, "encode", vae.dtype)
    return over_rows(per_picture(scaled(latents, vae), count), count)


def _draw(encoded, generator: torch.Generator) -> Tensor:
    posterior = getattr(encoded, "latent_dist", None)
    return encoded.latents if posterior is None else posterior.sample(generator)


def noised(latents: Tensor, noise: Tensor, scheduler: SchedulerMixin, timesteps: Tensor) -> Tensor:
    """Return latents (B, C, h, w) with the noise that they have before the first of the timesteps (T,) to run."""
    return scheduler.add_noise(latents, noise, timesteps[:1].repeat(len(latents)))


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
