"""Latents to colours by one matrix: what previews are made with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from runtime.errors import InputError
from runtime.machine.files import read_json, write_json
from runtime.model.vae import scaled

FILE = "latent_rgb.json"  # beside a VAE's config: "factors" (C, 3) and "bias" (3,)
SIDE = 64  # pixels of a colour that is shown to a VAE


@dataclass(frozen=True)
class LatentRGB:
    """A linear projection of latents to colours in [-1, 1]; factors (C, 3) and bias (3,) float32."""

    factors: Tensor
    bias: Tensor

    def pixels(self, latents: Tensor) -> Tensor:
        """Return (B, 3, h, w) in [0, 1] of latents (B, C, h, w)."""
        factors, bias = self.factors.to(latents), self.bias.to(latents)
        colours = torch.einsum("bchw,cr->brhw", latents, factors) + bias[:, None, None]
        return (colours / 2 + 0.5).clamp(0, 1)

    def write(self, folder: Path) -> None:
        """Write it beside a VAE's config."""
        write_json({"factors": self.factors.tolist(), "bias": self.bias.tolist()}, folder / FILE)

    @classmethod
    def read(cls, folder: Path, channels: int) -> LatentRGB | None:
        """Return the one beside a VAE's config; None where there is none.

        Raises InputError where the file does not hold one for latents of `channels`.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        given = read_json(path)
        try:
            found = [torch.tensor(given[key], dtype=torch.float32) for key in ("factors", "bias")]
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(f"{path}: {error}; expected factors and bias, lists of numbers") from error
        if [tuple(t.shape) for t in found] != [(channels, 3), (3,)] or not all(
            t.isfinite().all() for t in found
        ):
            raise InputError(f"{path}: expected {channels} x 3 factors and 3 numbers of bias, all finite")
        return cls(*found)


# Of SDXL's VAE and its fine-tunes, which have its scaling factor: comfy/latent_formats.py, ComfyUI
SDXL_SCALING = 0.13025
SDXL = LatentRGB(
    torch.tensor(
        [
            [0.3651, 0.4232, 0.4341],
            [-0.2533, -0.0042, 0.1068],
            [0.1076, 0.1111, -0.0362],
            [-0.3165, -0.2492, -0.2188],
        ]
    ),
    torch.tensor([0.1084, -0.0175, -0.0011]),
)


def known_projection(vae: AutoencoderKL, folder: Path | None = None) -> LatentRGB | None:
    """Return the projection that is known for a VAE: of the file beside its config, or SDXL's; None for another."""
    found = None if folder is None else LatentRGB.read(folder, vae.config.latent_channels)
    if found is None and vae.config.latent_channels == 4 and vae.config.scaling_factor == SDXL_SCALING:
        return SDXL
    return found


@torch.inference_mode()
def fit(vae: AutoencoderKL, pictures: Tensor | None = None) -> LatentRGB:
    """Return the projection that fits a VAE's latents of pictures (N, 3, H, W) in [0, 1] best, in least squares.

    By default of 27 plain colours. Raises InputError where latents are not finite.
    """
    if pictures is None:
        colours = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)))
        pictures = colours[:, :, None, None].expand(-1, -1, SIDE, SIDE)
    where = next(vae.parameters())
    posterior = vae.encode((2 * pictures - 1).to(where)).latent_dist
    latents = scaled(posterior.mode().float(), vae).cpu()
    wanted = F.interpolate(pictures, latents.shape[2:], mode="area") * 2 - 1
    rows, seen = (x.movedim(1, -1).reshape(-1, x.shape[1]).double() for x in (latents, wanted))
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, seen, driver="gelsd").solution.float()
    if not solution.isfinite().all():
        raise InputError("preview: the VAE's latents are not finite")
    return LatentRGB(solution[:-1], solution[-1])
