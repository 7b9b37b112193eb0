"""python -m training.embedded.few_steps [--work out/embedded-build] [--out examples/few-steps.safetensors]

A LoRA by which the embedded model draws in four steps without guidance: latent consistency distillation (LCM-LoRA,
arXiv 2311.05556) of the finished model and its canny adapter, guidance included. It is to this model what LCM-LoRA and
SDXL-Lightning are to SDXL:

    python -m runtime.generate --lora examples/few-steps.safetensors \\
        --scheduler lcm --steps 4 --guidance 1 --prompt ...

Stop it at any moment and run it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from runtime.adapter import embedded_adapters, load_adapter
from runtime.loading import EMBEDDED
from runtime.masks import mask_pyramid
from training.embedded.adapter import random_mask, unpack_edges
from training.embedded.base import cache_latents, time_ids
from training.embedded.stage import DEVICE, Stage, autocast
from training.embedded.text import encode, tokenize
from training.embedded.vae import SIZE
from training.embedded.world import sample_scene
from training.group_norm import use_quick_group_norm

STEPS, BATCH, RANK = 3_000, 32, 32
GUIDANCE = 5.0  # of the teacher: the pipeline's default
GRID = 50  # steps of the teacher's schedule, diffusers' LCMScheduler's original_inference_steps
FREE_SHARE = 0.3  # of samples without control
# Every layer that has weights: so small a model has none to spare.
TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut|conv)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.embedded.few_steps", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/embedded-build"), help="checkpoints and caches"
    )
    parser.add_argument("--out", type=Path, default=Path("examples/few-steps.safetensors"), help="the LoRA")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    pipe = StableDiffusionXLPipeline.from_pretrained(EMBEDDED).to(DEVICE)
    adapter = load_adapter(embedded_adapters()["canny"], device=DEVICE, dtype=torch.float32)
    cache = cache_latents(pipe.vae, args.work)
    unet = train(pipe, adapter, cache, args.work, args.steps)
    layers = {name: weight.half() for name, weight in get_peft_model_state_dict(unet).items()}
    pipe.save_lora_weights(args.out.parent, unet_lora_layers=layers, weight_name=args.out.name)


def train(
    pipe: StableDiffusionXLPipeline, adapter, cache: dict[str, Tensor], folder: Path, steps: int
) -> UNet2DConditionModel:
    """The pipeline's UNet with a trained LoRA (averaged weights) in it."""
    torch.manual_seed(0)
    unet = use_quick_group_norm(pipe.unet.requires_grad_(False))
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="gaussian")
    )
    encoders = [pipe.text_encoder.requires_grad_(False), pipe.text_encoder_2.requires_grad_(False)]
    stage = Stage("few_steps", unet, folder, steps=steps, lr=1e-3, seed=4)
    scheduler, tokenizers = pipe.scheduler, (pipe.tokenizer, pipe.tokenizer_2)
    latents = cache["latents"] * pipe.vae.config.scaling_factor / cache["scaling_factor"]
    captions = [sample_scene(i).caption for i in range(len(latents))]
    ids, empty = tokenize(tokenizers, captions), tokenize(tokenizers, [""])
    sides = [-(-SIZE // stride) for stride in (16, 16, 32, 32)]
    abar = scheduler.alphas_cumprod

    def predict(
        z: Tensor, t: Tensor, text: Tensor, pooled: Tensor, control: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that the UNet sees in z at timesteps t (B,): it predicts v."""
        added = {"text_embeds": pooled, "time_ids": time_ids(len(z)).to(DEVICE)}
        features = [f.clone() for f in control]
        call = {"added_cond_kwargs": added, "down_intrablock_additional_residuals": features}
        v = unet(z, t.to(DEVICE), text, **call).sample.float()
        a, s = levels(abar, t)
        return a * z - s * v, s * z + a * v

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([4, step])
        rows = torch.from_numpy(rng.integers(0, len(captions), BATCH))
        z0 = latents[rows].to(DEVICE)
        t = (torch.from_numpy(rng.integers(1, GRID + 1, BATCH)) * (1000 // GRID) - 1).long()
        before = (t - 1000 // GRID).clamp(min=0)
        a, s = levels(abar, t)
        z = a * z0 + s * torch.randn_like(z0)
        with autocast():
            with torch.no_grad():
                text, pooled = encode(encoders, [i[rows].to(DEVICE) for i in ids])
                free, free_pooled = (
                    x.expand(BATCH, *x.shape[1:]) for x in encode(encoders, [e.to(DEVICE) for e in empty])
                )
                condition = unpack_edges(cache["edges"][rows]).to(DEVICE)
                mask = torch.cat([random_mask(rng) * (rng.random() > FREE_SHARE) for _ in range(BATCH)]).to(
                    DEVICE
                )
                gates = mask_pyramid(mask, [(side, side) for side in sides])
                control = [f * g for f, g in zip(adapter(condition), gates, strict=True)]
                unet.disable_adapters()
                both = torch.cat([text, free]), torch.cat([pooled, free_pooled])
                clean, noise = predict(
                    z.repeat(2, 1, 1, 1), t.repeat(2), *both, [c.repeat(2, 1, 1, 1) for c in control]
                )
                unet.enable_adapters()
                clean, noise = (guided(x) for x in (clean, noise))
                a, s = levels(abar, before)
                earlier = a * clean + s * noise  # a step of DDIM
                target = consistent(earlier, predict(earlier, before, text, pooled, control)[0], before)
            made = consistent(z, predict(z, t, text, pooled, control)[0], t)
        distance = (made - target).square()
        return {"huber": ((distance + 1e-6).sqrt() - 1e-3).mean()}  # the original's, c = 0.001

    if not stage.done:
        unet.train()
        stage.run(loss_of)
    stage.use_average()
    return unet.eval()


def levels(abar: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of each timestep the parts of signal and noise, (B, 1, 1, 1): z_t = alpha z0 + sigma eps."""
    found = abar[t].to(DEVICE).view(-1, 1, 1, 1)
    return found.sqrt(), (1 - found).sqrt()


def guided(rows: Tensor) -> Tensor:
    """Classifier-free guidance of (2B, ...), the rows with the prompt first."""
    with_prompt, without = rows.chunk(2)
    return without + GUIDANCE * (with_prompt - without)


def consistent(z: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """The consistency function: z itself at t = 0, the clean latents soon after; as diffusers' LCMScheduler has it."""
    scaled = 10.0 * t.to(z.device).view(-1, 1, 1, 1)
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    return skip * z + out * clean


if __name__ == "__main__":
    main()
