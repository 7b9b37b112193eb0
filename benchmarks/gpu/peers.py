"""diffusers on the same weights: a step and a picture, eager in channels_last, and with its blocks compiled."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLAdapterPipeline

from benchmarks.gpu.device import DEVICE, ON_GPU, peak_gib, time_calls
from benchmarks.gpu.ours import COMPILE_SECONDS, COMPILER, Recorder, profiled
from benchmarks.gpu.world import PROMPT, SIZE, diffusers_parts, latents, randn, region, step_inputs


def run(recorder: Recorder, small: bool) -> None:
    parts, adapter = diffusers_parts(small)
    parts.unet.to(memory_format=torch.channels_last)
    parts.vae.to(memory_format=torch.channels_last)
    components = parts.components | {"scheduler": EulerDiscreteScheduler.from_config(parts.scheduler.config)}
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    pipe = StableDiffusionXLAdapterPipeline(adapter=adapter, **{name: components[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    recorder.measure("step, diffusers", lambda: step_row(parts.unet))
    profiled(recorder, "diffusers", stepper(parts.unet))
    recorder.measure("picture, diffusers", lambda: picture_row(pipe), 12)
    decode = decoder(parts.vae)
    vae = {"stage": "vae", "side": "diffusers", "size": SIZE, "images": 1}
    recorder.measure(
        "vae decode, diffusers", lambda: vae | {"memory_gib": peak_gib(decode), **time_calls(decode)}
    )
    if recorder.budget.allows(COMPILE_SECONDS):
        parts.unet.compile_repeated_blocks(fullgraph=True, backend=COMPILER)
        recorder.measure("step, diffusers, blocks compiled", lambda: step_row(parts.unet), COMPILE_SECONDS)
        recorder.measure("picture, diffusers, blocks compiled", lambda: picture_row(pipe), 12)


def stepper(unet):
    """Return the same guided step with the same control, as diffusers' pipeline calls its UNet."""
    given = step_inputs(unet.config, 1)
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    gated = [torch.cat([level] * 2) for level in given["control"].gated(3)]
    sample = latents(2).to(unet.dtype).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> None:
        residuals = [level.clone() for level in gated]  # as its pipeline does, at every step
        call = {"added_cond_kwargs": added, "down_intrablock_additional_residuals": residuals}
        unet(sample, given["timesteps"][3], given["text"], **call, return_dict=False)

    return run


def step_row(unet) -> dict[str, object]:
    run = stepper(unet)
    values = {"stage": "step", "side": "diffusers", "size": SIZE, "images": 1, "steps": 1}
    return values | {"memory_gib": peak_gib(run), **time_calls(run)}


def picture_row(pipe, steps: int = 30 if ON_GPU else 2) -> dict[str, object]:
    image = region().condition.expand(-1, 3, -1, -1)
    generator = torch.Generator(DEVICE)

    def draw() -> None:
        call = {"height": SIZE, "width": SIZE, "num_inference_steps": steps, "guidance_scale": 5.0}
        pipe(PROMPT, image=image, generator=generator.manual_seed(0), **call)

    values = {"stage": "picture", "side": "diffusers", "size": SIZE, "images": 1, "steps": steps}
    return values | {"memory_gib": peak_gib(draw), **time_calls(draw, 2.0, least=3)}


def decoder(vae):
    side = SIZE // 8

    @torch.inference_mode()
    def decode() -> None:
        vae.decode(randn(1, 4, side, side), return_dict=False)

    return decode
