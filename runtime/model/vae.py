"""The VAE, which is diffusers'."""

from __future__ import annotations

from diffusers import AutoencoderKL


def vae_factor(vae: AutoencoderKL) -> int:
    """Return how many pixels a latent's side is."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
