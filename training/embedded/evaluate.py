"""Measures of the embedded model: reconstruction, what the prompt asked for, and where the control holds."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from runtime.control.masks import box
from runtime.control.region import Region
from runtime.pipeline import LocalControlPipeline
from training.embedded.base import edges
from training.embedded.stage import DEVICE
from training.embedded.vae import SIZE, to_pixels
from training.embedded.world import BACKGROUNDS, COLOURS, Scene, render, sample_scene
from training.metrics import lfmse_canny

HELD_OUT_SEED = 50_000_000  # scenes that no stage has seen, each with a held-out pair of shape and colour
COLOUR_SHARE = 0.008  # of the picture's pixels: a third of the smallest shape
BACKGROUND_SHARE = 0.3
NEAREST = 60.0  # in CIE Lab: a pixel further than this from every known colour counts as none

NAMES = [*COLOURS, *BACKGROUNDS]


def held_out_scenes(count: int) -> list[Scene]:
    return [sample_scene(HELD_OUT_SEED + i, held_out=True) for i in range(count)]


@torch.inference_mode()
def vae_psnr(vae: AutoencoderKL, count: int = 200) -> float:
    """Return mean PSNR in dB of reconstructed held-out scenes, at 8 bits."""
    values = []
    for scene in held_out_scenes(count):
        image = render(scene, SIZE)
        decoded = vae.decode(vae.encode(to_pixels([image]).to(DEVICE, vae.dtype)).latent_dist.mode()).sample
        pixels = ((decoded[0].float().cpu().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        values.append(10 * np.log10(255**2 / max(np.mean((pixels - image) ** 2), 1e-6)))
    return float(np.mean(values))


def colour_map(image: np.ndarray) -> np.ndarray:
    """Return (H, W) of the number, in COLOURS then BACKGROUNDS, of the one that each pixel of (H, W, 3) uint8
    ``image`` is nearest to in CIE Lab; -1 where it is far from all.
    """
    names, centres = zip(*_palette(), strict=True)
    pixels = _lab(image.reshape(-1, 3))
    distance = np.linalg.norm(pixels[:, None] - _lab(np.array(centres))[None], axis=2)
    numbers = np.array([NAMES.index(name) for name in names])
    nearest = np.where(distance.min(1) < NEAREST, numbers[distance.argmin(1)], -1)
    return nearest.reshape(image.shape[:2])


def colour_shares(image: np.ndarray) -> dict[str, float]:
    """Return share of the pixels of (H, W, 3) uint8 ``image`` that are of each colour and background."""
    found = colour_map(image)
    return {name: float(np.mean(found == i)) for i, name in enumerate(NAMES)}


def shows(image: np.ndarray, scene: Scene) -> bool:
    """Return whether all colours that the scene's caption asks for are there, on its background and no other."""
    shares = colour_shares(image)
    colours = all(shares[thing.colour] >= COLOUR_SHARE for thing in scene.things)
    background = max(BACKGROUNDS, key=shares.__getitem__)
    return colours and background == scene.background and shares[background] >= BACKGROUND_SHARE


def prompt_score(
    pipe: LocalControlPipeline, count: int = 200, batch: int = 20
) -> tuple[float, list[Image.Image]]:
    """Return share of the pictures of ``count`` held-out prompts that show what was asked, and the pictures."""
    scenes, images = held_out_scenes(count), []
    for first in range(0, count, batch):
        captions = [scene.caption for scene in scenes[first : first + batch]]
        images += pipe(captions, seed=first).images
    good = [shows(np.asarray(image), scene) for image, scene in zip(images, scenes, strict=True)]
    return float(np.mean(good)), images


@dataclass
class ControlScore:
    """LFMSE (lower is better) against the condition on the masked half, and on the other, which is free of it."""

    inside: float
    outside: float


def control_scores(pipe: LocalControlPipeline, count: int = 48) -> dict[str, ControlScore]:
    """Held-out scenes drawn with their edges as control: nowhere, everywhere, in the left half only."""
    mask = box(SIZE, SIZE, (0, 0, SIZE // 2, SIZE))
    settings = {"none": {"scale": 0.0}, "everywhere": {}, "masked": {"mask": mask}}
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for i, scene in enumerate(held_out_scenes(count)):
        condition = edges(render(scene, SIZE))
        for name, options in settings.items():
            image = pipe(scene.caption, [Region(condition, **options)], seed=i).images[0]
            error = lfmse_canny(edges(np.asarray(image)), condition, mask[0, 0].numpy())
            errors[name].append((error.inside, error.outside_wanted))
    return {name: ControlScore(*np.mean(pairs, axis=0).tolist()) for name, pairs in errors.items()}


def _palette() -> list[tuple[str, tuple[int, int, int]]]:
    """Return every colour lit and in shade, and every background from top to bottom."""
    entries = []
    for name, rgb in COLOURS.items():
        entries += [(name, tuple(min(255, round(c * light)) for c in rgb)) for light in (0.85, 1.0, 1.12)]
    for name, (_, top, bottom) in BACKGROUNDS.items():
        mixes = ((1 - k) * np.array(top) + k * np.array(bottom) for k in (0.0, 0.5, 1.0))
        entries += [(name, tuple(int(c) for c in mix)) for mix in mixes]
    return entries


def _lab(rgb: np.ndarray) -> np.ndarray:
    """Return (N, 3) in 0..255 -> CIE Lab, (N, 3) float32."""
    return cv2.cvtColor(rgb[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0]
