"""A whole denoising step and a whole training step of SDXL at full size, counted: diffusers', ours and its kernels.

1024 x 1024, bf16, one masked control. Denoising: from latents to latents, Euler, guidance. Training: a batch of 4, from
latents to the adapter's gradients, without the optimizer; diffusers' has neither masks nor the loss on edges.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, T2IAdapter, UNet2DConditionModel
from torch import Tensor

from benchmarks.gpu import world
from benchmarks.random_sdxl import make_adapter, read_config
from benchmarks.static.counter import count_again
from kernels import ops
from runtime.loading.quiet import quiet
from runtime.loading.single_file import SDXL_CONFIGS
from runtime.model.unet import UNet
from runtime.optimize.fused import fuse_unet
from runtime.optimize.fused_qkv import fuse_qkv
from runtime.sampling.denoiser import TorchDenoiser
from runtime.sampling.loop import Run
from training.config import TrainConfig
from training.loop.step import LossOf

SIZE, BATCH = 1024, 4
META = torch.device("meta")
Step = Callable[[], object]


def count_steps() -> list[dict[str, object]]:
    """Return a row for each step and side."""
    rows = []
    with (
        mock.patch.multiple(world, DEVICE=META, DTYPE=torch.bfloat16),
        mock.patch.object(ops, "INTERPRETED", True),  # kernels take tensors that are on no GPU
        quiet(),
    ):
        for step, sides in {"denoising": DENOISING, "training": TRAINING}.items():
            for side, (backend, make) in sides.items():
                with ops.use_backend(backend):
                    found = count_again(make(_theirs()))
                rows.append({"step": step, "side": side, **vars(found), "torch": torch.__version__})
    return rows


def _theirs() -> UNet2DConditionModel:
    with META:
        unet = UNet2DConditionModel.from_config(read_config("unet")).to(torch.bfloat16)
    return unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler.from_pretrained(SDXL_CONFIGS / "scheduler")


def denoise_diffusers(unet: UNet2DConditionModel) -> Step:
    """Return a step of diffusers' StableDiffusionXLAdapterPipeline."""
    given, scheduler, latents = world.step_inputs(unet.config, 1, size=SIZE), _scheduler(), _latents(1)
    scheduler.set_timesteps(30)
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    gated = [torch.cat([level] * 2) for level in given["control"].gated(0)]

    @torch.no_grad()
    def step() -> Tensor:
        scheduler._step_index = None
        t = scheduler.timesteps[0]
        sample = scheduler.scale_model_input(torch.cat([latents] * 2), t).to(unet.dtype)
        call = {"added_cond_kwargs": added, "return_dict": False}
        residuals = [level.clone() for level in gated]
        output = unet(sample, t, given["text"], down_intrablock_additional_residuals=residuals, **call)[0]
        unguided, guided = output.chunk(2)
        return scheduler.step(unguided + 5.0 * (guided - unguided), t, latents, return_dict=False)[0]

    return step


def denoise_ours(theirs: UNet2DConditionModel) -> Step:
    """Return a step of the sampling loop."""
    unet, scheduler = fuse_qkv(UNet.from_diffusers(theirs)), _scheduler()
    if ops.current_backend() == "triton":
        fuse_unet(unet)
    scheduler.set_timesteps(30)
    with torch.no_grad():
        given = world.step_inputs(unet.config, 1, size=SIZE) | {"timesteps": scheduler.timesteps.to(META)}
        run = Run(TorchDenoiser(unet).prepare(**given), scheduler, _latents(1), 5.0, [])

    @torch.no_grad()
    def step() -> None:
        run.index = 0
        run.advance(run.step(run.sample(), 0))

    return step


def train_diffusers(unet: UNet2DConditionModel) -> Step:
    """Return a step as in train_t2i_adapter_sdxl.py, on encoded pictures, and in bf16 where its autocast turns norms to
    float32.
    """
    batch, adapter = _batch(unet.config), _adapter(unet.config)
    added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}

    def step() -> None:
        noisy = batch["latents"] + batch["noise"] * batch["abar"]
        residuals = adapter(batch["condition"])
        call = {"added_cond_kwargs": added, "down_intrablock_additional_residuals": residuals}
        output = unet(noisy.to(unet.dtype), batch["t"], batch["text"], **call).sample
        denoised = output * -batch["abar"] + noisy
        F.mse_loss(denoised.float(), batch["latents"]).backward()

    return step


def train_ours(theirs: UNet2DConditionModel) -> Step:
    """Return the trainer's step, with both terms of the loss."""
    batch, adapter = _batch(theirs.config), _adapter(theirs.config)
    model = SimpleNamespace(unet=UNet.from_diffusers(theirs), scheduler=_scheduler())
    config = TrainConfig(dtype="bf16", batch=BATCH, resolution=SIZE, condition_channels=3)
    with mock.patch("training.loop.step.check_schedule"):  # reads values
        loss_of = LossOf(model, config)

    def step() -> None:
        features = [level.to(memory_format=torch.channels_last) for level in adapter(batch["condition"])]
        sum(term.mean() for term in loss_of.terms(features, batch).values()).backward()

    return step


def _adapter(config) -> T2IAdapter:
    with META:
        return make_adapter(config.block_out_channels).to(torch.bfloat16, memory_format=torch.channels_last)


def _batch(config) -> dict[str, Tensor]:
    """Return what the trainer reads for a batch, and each row's place in the noise."""
    text = world.step_inputs(config, 1, size=SIZE)
    made = {name: torch.cat([text[name]] * 2) for name in ("text", "pooled", "time_ids")}
    made |= {name: _latents(BATCH) for name in ("latents", "noise")}
    made["condition"] = world.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    made["mask"] = torch.ones(BATCH, 1, SIZE, SIZE, device=META)
    made["abar"] = torch.ones(BATCH, 1, 1, 1, device=META)
    return made | {"t": torch.zeros(BATCH, dtype=torch.int64, device=META)}


def _latents(images: int) -> Tensor:
    return world.latents(images, SIZE)


PLAIN, KERNELS = "torch", "triton"
DENOISING = {
    "diffusers": (PLAIN, denoise_diffusers),
    "ours, kernels off": (PLAIN, denoise_ours),
    "ours": (KERNELS, denoise_ours),
}
TRAINING = {
    "diffusers": (PLAIN, train_diffusers),
    "ours, kernels off": (PLAIN, train_ours),
    "ours": (KERNELS, train_ours),
}
