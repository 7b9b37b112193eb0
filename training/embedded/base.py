"""Stage 2 of the embedded model: SDXL's UNet in small, with its two text encoders, on cached latents."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from runtime.control.conditions import preprocess
from runtime.machine.files import replacing
from training.embedded.stage import DEVICE, Stage, autocast
from training.embedded.text import encode, make_text_encoders, make_tokenizers, tokenize, write_vocabulary
from training.embedded.vae import SIZE, to_pixels
from training.embedded.world import render, sample_scene
from training.loop.group_norm import use_quick_group_norm
from training.loop.loss import add_noise, v_target

SCENES = 32_000
STEPS, BATCH = 7_000, 64
EMPTY_PROMPT_SHARE = 0.1


def make_unet() -> UNet2DConditionModel:
    """SDXL's structure: no attention at full resolution, added text and time ids, linear projections."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 112),
        layers_per_block=1,
        norm_num_groups=16,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 3, 7),  # heads, as in SDXL's configuration
        cross_attention_dim=192,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=96 + 6 * 16,
    ).to(memory_format=torch.channels_last)


def make_scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise schedule; v prediction, which binds colours to words far sooner than epsilon does."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def edges(image: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8 -> (H, W) uint8 canny edges, 0 or 255, at the thresholds users get."""
    return np.asarray(preprocess("canny", Image.fromarray(image)).convert("L"))


def cache_latents(vae: AutoencoderKL, folder: Path, scenes: int = SCENES) -> dict[str, torch.Tensor]:
    """Return latents (N, 4, 16, 16), scaled to unit variance, and packed canny edges (N, 128*16) of scenes 0..N-1.

    Kept in ``folder/latents.safetensors`` with the scaling factor that was measured.
    """
    path = folder / "latents.safetensors"
    if path.exists():
        return load_file(path)
    cv2.setNumThreads(1)
    latents, packed, batch = [], [], 32
    for first in tqdm(range(0, scenes, batch), desc="latents", mininterval=5):
        images = [render(sample_scene(i), SIZE) for i in range(first, min(first + batch, scenes))]
        with torch.inference_mode(), autocast():
            latents.append(
                vae.encode(to_pixels(images).to(DEVICE)).latent_dist.mode().float().cpu().contiguous()
            )
        packed += [np.packbits(edges(image) > 127) for image in images]
    stacked = torch.cat(latents)
    factor = 1 / stacked.std()
    tensors = {
        "latents": stacked * factor,
        "edges": torch.from_numpy(np.stack(packed)),
        "scaling_factor": factor.reshape(1),
    }
    with replacing(path) as partial:
        save_file(tensors, partial)
    return tensors


class Base(nn.Module):
    """What is trained together: the UNet and both text encoders."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.unet = make_unet()
        self.text_encoders = nn.ModuleList(make_text_encoders(vocabulary))


def time_ids(batch: int) -> torch.Tensor:
    """SDXL's added ids, (B, 6): original size, crop's corner, target size."""
    return torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32).expand(batch, -1)


def random_time_ids(batch: int) -> torch.Tensor:
    """True ids for one half, any sizes for the other, so that larger pictures have sizes that were seen."""
    sizes = torch.randint(4, 33, (batch, 2)) * 16.0
    other = torch.cat([sizes, torch.zeros(batch, 2), sizes], dim=1)
    return torch.where(torch.rand(batch, 1) < 0.5, time_ids(batch), other)


def train(vae: AutoencoderKL, folder: Path, steps: int = STEPS, scenes: int = SCENES):
    """Train; return the base (averaged weights), its tokenizers, the cache and the stage."""
    torch.manual_seed(0)
    tokenizers = make_tokenizers(write_vocabulary(folder / "vocabulary"))
    base = Base(len(tokenizers[0])).to(DEVICE)
    use_quick_group_norm(base.unet)
    cache, scheduler = cache_latents(vae, folder, scenes), make_scheduler()
    stage = Stage("base", base, folder, steps=steps, lr=1e-3, seed=2)
    if not stage.done:
        captions = [sample_scene(i).caption for i in range(len(cache["latents"]))]
        ids = tokenize(tokenizers, captions)
        empty = tokenize(tokenizers, [""])

        def loss_of(step: int) -> dict[str, torch.Tensor]:
            rows = torch.randint(len(captions), (BATCH,))
            latents = cache["latents"][rows].to(DEVICE)
            dropped = (torch.rand(BATCH, 1) < EMPTY_PROMPT_SHARE).expand(-1, ids[0].shape[1])
            words = [torch.where(dropped, e, i[rows]).to(DEVICE) for i, e in zip(ids, empty, strict=True)]
            # one timestep from each of BATCH equal strata: a steadier loss
            t = ((torch.randperm(BATCH) + torch.rand(BATCH)) / BATCH * 1000).long()
            noise, abar = torch.randn_like(latents), scheduler.alphas_cumprod[t].to(DEVICE)
            noisy, alpha, sigma = add_noise(latents, noise, abar)
            target = v_target(latents, noise, alpha, sigma)
            with autocast():
                text, pooled = encode(base.text_encoders, words)
                added = {"text_embeds": pooled, "time_ids": random_time_ids(BATCH).to(DEVICE)}
                output = base.unet(noisy, t.to(DEVICE), text, added_cond_kwargs=added).sample
            return {"v": F.mse_loss(output.float(), target)}

        base.train()
        stage.run(loss_of)
    stage.use_average()
    return base.eval(), tokenizers, cache, stage
