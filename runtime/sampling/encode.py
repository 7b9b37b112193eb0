"""A picture to latents, for runs that start from one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import Tensor

from runtime.machine.finite import check_finite
from runtime.model.vae import scaled


def encode(vae: AutoencoderKL, pixels: Tensor, generators: Sequence[torch.Generator], count: int) -> Tensor:
    """Return latents (count, C, h, w) float32 of pixels (1, 3, H, W) in [0, 1], one drawn for each image.

    generators: one for each image, or one for all; each draws from the VAE's posterior, as diffusers' pipelines do. A
    VAE without one (AutoencoderTiny) has one answer. Raises InputError where a latent is not finite.
    """
    encoded = vae.encode((2 * pixels - 1).to(vae.dtype))
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        drawn = encoded.latents.expand(count, -1, -1, -1)
    elif len(generators) == 1:
        drawn = posterior.sample(generators[0]).expand(count, -1, -1, -1)
    else:
        drawn = torch.cat([posterior.sample(generator) for generator in generators])
    latents = drawn.float()
    check_finite(latents, "encode", vae.dtype)
    return scaled(latents, vae)


def noised(latents: Tensor, noise: Tensor, scheduler: SchedulerMixin, timesteps: Tensor) -> Tensor:
    """Return latents (B, C, h, w) with the noise that they have before the first of the timesteps (T,) to run."""
    return scheduler.add_noise(latents, noise, timesteps[:1].repeat(len(latents)))
