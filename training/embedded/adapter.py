"""Stage 3 of the embedded model: the canny adapter, masked features and a loss on the edges of the predicted z0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import T2IAdapter

from kernels import ops
from runtime.control.levels import level_sizes
from runtime.control.masks import box, circle, mask_pyramid
from training.embedded.base import Base, make_scheduler, time_ids
from training.embedded.stage import DEVICE, Stage, autocast
from training.embedded.text import encode, tokenize
from training.embedded.vae import SIZE
from training.embedded.world import sample_scene
from training.loop.group_norm import use_quick_group_norm
from training.loop.loss import add_noise

STEPS, BATCH = 8_000, 32
# The variant of `benchmarks.quality.ablation` that follows best inside the mask: a linear filter keeps the sign of an
# edge, which the Sobel magnitude, the original's, loses.
EDGES, LAMBDA = "laplacian", 10.0
EMPTY_PROMPT_SHARE = 0.5  # the original's: the control must not lean on the words
MIN_BOX = 25  # side in pixels: the original's 10,000 px at 512


def make_adapter() -> T2IAdapter:
    return T2IAdapter(
        in_channels=1,
        channels=[64, 96, 112, 112],
        num_res_blocks=1,
        downscale_factor=16,
        adapter_type="full_adapter_xl",
    ).to(memory_format=torch.channels_last)


def random_mask(rng: np.random.Generator) -> torch.Tensor:
    """Return (1, 1, 128, 128) float32: mostly a box or a circle, sometimes a half or the whole image."""
    kind = rng.random()
    if kind < 0.1:
        return torch.ones(1, 1, SIZE, SIZE)
    if kind < 0.25:
        half = box(SIZE, SIZE, (0, 0, SIZE // 2, SIZE))
        return half.rot90(int(rng.integers(4)), (2, 3))
    if kind < 0.45:
        centre = rng.uniform(0.2 * SIZE, 0.8 * SIZE, 2)
        return circle(SIZE, SIZE, tuple(centre), rng.uniform(MIN_BOX / 2, SIZE / 2))
    width, height = rng.integers(MIN_BOX, SIZE, 2, endpoint=True)
    x, y = rng.integers(0, SIZE - width, endpoint=True), rng.integers(0, SIZE - height, endpoint=True)
    return box(SIZE, SIZE, (x, y, x + width, y + height))


def unpack_edges(packed: torch.Tensor) -> torch.Tensor:
    """Return (B, 2048) uint8 of the cache -> (B, 1, 128, 128) float32, 0 or 1."""
    bits = np.unpackbits(packed.numpy(), axis=1).reshape(-1, 1, SIZE, SIZE)
    return torch.from_numpy(bits).float()


def train(base: Base, tokenizers, cache: dict[str, torch.Tensor], folder: Path, steps: int = STEPS):
    """Train; return the adapter (averaged weights) and its stage; ``base`` stays as it is."""
    torch.manual_seed(0)
    adapter, scheduler = make_adapter().to(DEVICE), make_scheduler()
    unet = use_quick_group_norm(base.unet)
    base.requires_grad_(False).eval()
    stage = Stage("adapter", adapter, folder, steps=steps, lr=1e-3, seed=3)
    sizes = [
        *level_sizes(SIZE, SIZE),
        (SIZE // 8, SIZE // 8),
    ]  # the four features, and the latents for the loss
    if not stage.done:
        captions = [sample_scene(i).caption for i in range(len(cache["latents"]))]
        ids, empty = tokenize(tokenizers, captions), tokenize(tokenizers, [""])

        def loss_of(step: int) -> dict[str, torch.Tensor]:
            rng = np.random.default_rng([3, step])
            rows = torch.from_numpy(rng.integers(0, len(captions), BATCH))
            dropped = torch.from_numpy(rng.random((BATCH, 1)) < EMPTY_PROMPT_SHARE)
            words = [torch.where(dropped, e, i[rows]).to(DEVICE) for i, e in zip(ids, empty, strict=True)]
            latents = cache["latents"][rows].to(DEVICE)
            condition = unpack_edges(cache["edges"][rows]).to(DEVICE)
            mask = torch.cat([random_mask(rng) for _ in range(BATCH)]).to(DEVICE)
            *gates, latent_mask = mask_pyramid(mask, sizes)
            t = (
                ((1 - torch.from_numpy(rng.random(BATCH)) ** 3) * 1000).long().clamp(max=999)
            )  # more of the noisy steps
            abar = scheduler.alphas_cumprod[t].to(DEVICE)
            noisy, alpha, sigma = add_noise(latents, torch.randn_like(latents), abar)
            with autocast():
                with torch.no_grad():
                    text, pooled = encode(base.text_encoders, words)
                features = [f * g for f, g in zip(adapter(condition), gates, strict=True)]
                output = unet(
                    noisy,
                    t.to(DEVICE),
                    text,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids(BATCH).to(DEVICE)},
                    down_intrablock_additional_residuals=features,
                ).sample.float()
            loss, edges = ops.noise_and_z0_loss(
                output, noisy, latents, latent_mask, alpha, sigma, "v_prediction", edges=EDGES
            )
            return {"v": loss.mean(), EDGES: LAMBDA * edges.mean()}

        stage.run(loss_of)
    stage.use_average()
    return adapter.eval(), stage
