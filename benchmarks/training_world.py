"""What both sides of `benchmarks.training` train on: the same model and data, as each of them reads it."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from benchmarks.full_size import SMALL, build
from runtime.loading.load import EMBEDDED, load_model
from runtime.loading.single_file import SDXL_CONFIGS
from runtime.machine.arithmetic import DTYPES
from training.config import TrainConfig
from training.data.prepare import prepare
from training.data.rows import Plan, Rows, make_loader
from training.data.sources import open_source
from training.data.stores import Stores
from training.embedded.scenes import write_scenes

SCENES = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class World:
    """A model in diffusers' parts, and both sides' batches without end."""

    config: TrainConfig
    unet: UNet2DConditionModel
    vae: AutoencoderKL  # in float32, as diffusers' trainer has it by default
    scheduler: EulerDiscreteScheduler
    cached: Iterator[dict[str, Tensor]]  # what our loader gives
    decoded: Iterator[tuple]  # pixels, conditions, text, added conditions

    @property
    def channels(self) -> tuple[int, ...]:
        channels = self.unet.config.block_out_channels
        return (*channels, channels[-1])


def embedded_parts(options: argparse.Namespace, dtype: str, folder: Path) -> World:
    """Return the embedded model and scenes of its world, read from files as each side reads them."""
    write_scenes(folder / "scenes", SCENES)
    config = TrainConfig(
        data=str(folder / "scenes"),
        out=str(folder),
        dtype=dtype,
        batch=options.batch,
        workers=0,
        resolution=128,
    )
    model = load_model("embedded", device=DEVICE)
    stores = Stores.open(folder / "cache", config, model)
    entries = prepare(open_source(config), stores, folder / "cache", model, config, Accelerator())
    rows = Rows(entries, stores, config, 1000, model.vae.config.scaling_factor, 1)
    plan = Plan([e.bucket for e in entries], config.batch, config.seed)
    cached = iter(make_loader(rows, plan, 0, 0, 1, pin=False))
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED / "unet", torch_dtype=DTYPES[dtype]).to(DEVICE)
    decoded = images_and_text(folder / "scenes", config.batch, unet)
    return World(config, unet, model.vae, model.scheduler, cached, decoded)


def full_size_parts(options: argparse.Namespace, dtype: str, _: Path) -> World:
    """SDXL with random weights and made-up batches, which are there already: no side's loading is measured."""
    size = 256 if options.small else 1024
    unet_config = json.loads((SDXL_CONFIGS / "unet" / "config.json").read_text()) | (
        SMALL if options.small else {}
    )
    with torch.no_grad():
        unet = build(unet_config, DTYPES[dtype], torch.device(DEVICE))
    vae = (
        AutoencoderKL.from_config(AutoencoderKL.load_config(SDXL_CONFIGS / "vae"))
        .to(DEVICE)
        .eval()
        .requires_grad_(False)
    )
    scheduler = EulerDiscreteScheduler.from_pretrained(SDXL_CONFIGS / "scheduler")
    config = TrainConfig(dtype=dtype, batch=options.batch, resolution=size, condition_channels=3)
    random = functools.partial(torch.rand, device=DEVICE)
    text, added = made_up_text(options.batch, unet, size)
    pixels, condition = (random(options.batch, 3, size, size) for _ in range(2))
    cached = {
        "latents": random(options.batch, 4, size // 8, size // 8),
        "noise": random(options.batch, 4, size // 8, size // 8),
        "condition": condition,
        "mask": (random(options.batch, 1, size, size) > 0.5).float(),
        "text": text,
        "pooled": added["text_embeds"],
        "time_ids": added["time_ids"],
        "t": torch.randint(1000, (options.batch,), device=DEVICE),
    }
    return World(
        config, unet, vae, scheduler, repeat(cached), repeat((pixels * 2 - 1, condition, text, added))
    )


def made_up_text(batch: int, unet: UNet2DConditionModel, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cached text embeddings and added conditions of the shapes that the UNet takes."""
    config, where = unet.config, {"device": DEVICE, "dtype": unet.dtype}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    ids = torch.tensor([[size, size, 0, 0, size, size]] * batch, device=DEVICE, dtype=torch.float32)
    added = {"text_embeds": torch.randn(batch, pooled, **where), "time_ids": ids}
    return torch.randn(batch, 77, config.cross_attention_dim, **where), added


def images_and_text(folder: Path, batch: int, unet: UNet2DConditionModel) -> Iterator[tuple]:
    """Yield pictures and edges read from files, as that script's loader does; the text embeddings are there already."""
    files = sorted(folder.glob("*.png"))
    text, added = made_up_text(batch, unet, 128)
    edges = {file: cv2.imencode(".png", cv2.Canny(cv2.imread(str(file)), 100, 200))[1] for file in files}
    for first in count(0, batch):
        chosen = [files[(first + i) % len(files)] for i in range(batch)]
        images = np.stack([cv2.imread(str(file))[..., ::-1] for file in chosen])
        conditions = np.stack([cv2.imdecode(edges[file], cv2.IMREAD_GRAYSCALE) for file in chosen])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        yield pixels, torch.from_numpy(conditions)[:, None].float() / 255, text, added
