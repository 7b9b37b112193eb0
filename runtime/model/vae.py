"""The VAE, which is diffusers'."""

from __future__ import annotations

from diffusers import AutoencoderKL
from torch import Tensor


def vae_factor(vae: AutoencoderKL) -> int:
    """Return how many pixels a latent's side is."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def scaled(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Return a VAE's latents (B, C, h, w) as the UNet takes them."""
    normalized = _moments(latents, vae)
    if normalized is not None:
        mean, std = normalized
        latents = (latents - mean) / std
    return latents * vae.config.scaling_factor


def unscaled(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Return the UNet's latents (B, C, h, w) as the VAE decodes them."""
    latents, normalized = latents / vae.config.scaling_factor, _moments(latents, vae)
    if normalized is None:
        return latents
    mean, std = normalized
    return latents * std + mean


def _moments(latents: Tensor, vae: AutoencoderKL) -> tuple[Tensor, Tensor] | None:
    """Return the mean and spread of latents that the config gives, (1, C, 1, 1); None where it gives none."""
    mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is None or std is None:
        return None
    return tuple(latents.new_tensor(x).view(1, -1, 1, 1) for x in (mean, std))
