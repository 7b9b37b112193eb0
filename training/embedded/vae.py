"""Stage 1 of the embedded model: the autoencoder (factor 8, 4 latent channels) on drawn scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from runtime.model.latent_rgb import LatentRGB, fit
from training.embedded.stage import DEVICE, Stage, autocast
from training.embedded.world import render, sample_scene
from training.loop.group_norm import use_quick_group_norm

SIZE = 128
STEPS, BATCH = 6_000, 4
FIRST_SEED = 10_000_000  # scenes of its own: 2 to 5 objects, so that less of every picture is empty
KL_WEIGHT = 3e-3
THUMBNAIL_WEIGHT = 0.1
PREVIEW_SCENES = 64
# red, green, blue -> lightness, red against green, blue against yellow, each of about unit variance in this world
OPPONENT = ((0.7, 0.7, 0.7), (2.0, -2.0, 0.0), (-1.2, -1.2, 2.4))


def make_vae() -> AutoencoderKL:
    """SDXL's autoencoder, narrow: full-resolution layers cost a CPU far more than their arithmetic."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """Return (H, W, 3) uint8 pictures -> (B, 3, H, W) float32 in [-1, 1], channels last."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def thumbnail(pixels: torch.Tensor) -> torch.Tensor:
    """Return each latent pixel's mean colour, (B, 3, H, W) in [-1, 1] -> (B, 3, H / 8, W / 8), in opponent colours."""
    return torch.einsum("oc,bchw->bohw", pixels.new_tensor(OPPONENT), F.avg_pool2d(pixels, 8))


def train(folder: Path, steps: int = STEPS) -> tuple[AutoencoderKL, Stage]:
    """Return the trained autoencoder (averaged weights) and the stage that holds its step count and time."""
    torch.manual_seed(0)
    vae = use_quick_group_norm(make_vae()).to(DEVICE)
    stage = Stage("vae", vae, folder, steps=steps, lr=2e-3, seed=1)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        first = FIRST_SEED + step * BATCH
        pixels = to_pixels([render(sample_scene(first + i, things=(2, 5)), SIZE) for i in range(BATCH)]).to(
            DEVICE
        )
        with autocast():
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        mean = posterior.mean.float()
        kl = 0.5 * (mean.square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return {
            "l1": F.l1_loss(decoded, pixels),
            "mse": 4 * F.mse_loss(decoded, pixels),  # the square keeps colours from being confused early on
            # Left to itself the encoder lays all colours along one bent line, red beside orange and purple beside
            # green, and the UNet confuses the neighbours. SDXL's own latents are close to linear in colour.
            "thumbnail": THUMBNAIL_WEIGHT * F.mse_loss(mean[:, :3], thumbnail(pixels)),
            "kl": KL_WEIGHT * kl,
        }

    if not stage.done:
        vae.train()
        stage.run(loss_of)
    stage.use_average()
    return vae.eval(), stage


def fit_preview(vae: AutoencoderKL) -> LatentRGB:
    """Return what latents of this world's scenes look like, by one matrix; with the VAE's scaling factor set."""
    scenes = [render(sample_scene(FIRST_SEED + i, things=(2, 5)), SIZE) for i in range(PREVIEW_SCENES)]
    return fit(vae, to_pixels(scenes) / 2 + 0.5)
