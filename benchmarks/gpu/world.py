"""SDXL of full size with random weights on the device under test, and what one step of it takes."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline, T2IAdapter
from torch import Tensor

from benchmarks.full_size import SMALL, build
from benchmarks.gpu.device import DEVICE, ON_GPU
from benchmarks.random_sdxl import make_adapter, make_pipeline, read_config
from runtime import Region
from runtime.control.features import Control, strengths
from runtime.control.levels import STRIDES
from runtime.control.masks import box
from runtime.loading.load import from_diffusers
from runtime.optimize.specialize import specialize
from runtime.pipeline import LocalControlPipeline

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PROMPT = "a red fox in tall grass, morning light"
SIZE = 1024 if ON_GPU else 64


@torch.no_grad()
def diffusers_parts(small: bool) -> tuple[StableDiffusionXLPipeline, T2IAdapter]:
    """Return a pipeline and an adapter of diffusers, all in DTYPE on DEVICE."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = build(read_config("unet") | (SMALL if small else {}), DTYPE, DEVICE)
        parts = make_pipeline(unet, DTYPE, small)
        adapter = make_adapter(unet.config.block_out_channels).to(DTYPE)
    parts.vae.to(DTYPE)
    parts.set_progress_bar_config(disable=True)
    return parts, adapter.eval().requires_grad_(False)


def our_pipeline(small: bool, backend: str, quantize: str | None = None) -> LocalControlPipeline:
    """Return ours over the same weights, its layers exchanged as `from_pretrained` does."""
    parts, adapter = diffusers_parts(small)
    model = from_diffusers(parts)
    specialize(model, DEVICE, DTYPE, backend, quantize)
    return LocalControlPipeline(model, {"canny": adapter}, backend)


def region(size: int = SIZE) -> Region:
    """Return one control in the left half: sparse lines, as edges are."""
    lines = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)) > 0.95
    return Region(lines.float(), mask=box(size, size, (0, 0, size // 2, size)))


def step_inputs(config, images: int, steps: int = 30, size: int = SIZE) -> dict[str, object]:
    """Return the arguments of `Denoiser.prepare` for one guided prompt with one masked control.

    config: `UNetConfig`, or diffusers' of the same fields.
    """
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    width = config.cross_attention_dim
    ids = torch.tensor([[size, size, 0, 0, size, size]] * 2, device=DEVICE, dtype=DTYPE)
    return {
        "timesteps": torch.linspace(999, 1, steps, device=DEVICE),
        "text": randn(2, 77, width),
        "pooled": randn(2, pooled),
        "time_ids": ids,
        "control": control(config.block_out_channels, steps, size),
        "repeat": images,
    }


def control(channels: list[int], steps: int, size: int = SIZE) -> Control:
    features, masks = [], []
    for width, stride in zip((*channels, channels[-1]), STRIDES, strict=True):
        side = -(-size // stride)
        mask = torch.zeros(1, 1, side, side, device=DEVICE)
        mask[..., : side // 2] = 1
        features.append([randn(1, width, side, side).contiguous(memory_format=torch.channels_last)])
        masks.append([mask])
    return Control(features, masks, strengths([Region(torch.ones(1, 1, 16, 16))], steps), DEVICE)


def latents(images: int, size: int = SIZE) -> Tensor:
    return randn(images, 4, size // 8, size // 8).float()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)
