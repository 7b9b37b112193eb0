"""A picture to latents, for runs that start from one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import Tensor

from runtime.control.rows import over_rows, per_picture, spread
from runtime.machine.finite import check_finite
from runtime.model.vae import scaled


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
