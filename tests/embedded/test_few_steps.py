"""The few-step LoRA: the distillation's formulas, a step of it, and what the committed one draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline

from runtime import LocalControlPipeline, Region
from runtime.adapter import embedded_adapters, load_adapter
from runtime.loading import EMBEDDED
from runtime.masks import box
from training.embedded import few_steps
from training.embedded.base import edges
from training.embedded.evaluate import held_out_scenes, prompt_score, shows
from training.embedded.world import render
from training.metrics import lfmse_canny

LORA = Path(__file__).resolve().parents[2] / "examples" / "few-steps.safetensors"
CALL = {"steps": 4, "guidance": 1.0, "scheduler": "lcm"}


def test_the_consistency_function_is_the_schedulers():
    scheduler = LCMScheduler()
    for t in (0, 19, 999):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(t)))
        made = few_steps.consistent(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 10.0), torch.tensor([t]))
        assert made.item() == pytest.approx((skip + 10 * out).item(), rel=1e-5)
    z = torch.randn(2, 4, 3, 3)
    assert torch.equal(few_steps.consistent(z, z * 0, torch.tensor([0, 0])), z)


def test_the_grid_has_the_schedulers_timesteps():
    scheduler = LCMScheduler()
    scheduler.set_timesteps(4)
    grid = {i * (1000 // few_steps.GRID) - 1 for i in range(1, few_steps.GRID + 1)}
    assert set(scheduler.timesteps.tolist()) <= grid


def test_a_step_trains_the_lora_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(few_steps, "BATCH", 2)
    pipe = StableDiffusionXLPipeline.from_pretrained(EMBEDDED)
    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    adapter = load_adapter(embedded_adapters()["canny"], device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    cache = {
        "latents": torch.randn(3, 4, 16, 16, generator=generator),
        "edges": torch.randint(0, 256, (3, 2048), dtype=torch.uint8, generator=generator),
        "scaling_factor": torch.tensor([pipe.vae.config.scaling_factor]),
    }
    unet = few_steps.train(pipe, adapter, cache, tmp_path, steps=2)
    after = {name.replace(".base_layer", ""): p for name, p in unet.named_parameters() if "lora" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert any(p.any() for name, p in unet.named_parameters() if "lora_B" in name)


@pytest.fixture(scope="module")
def pipe() -> LocalControlPipeline:
    return LocalControlPipeline.from_pretrained(loras=[LORA])


def test_four_steps_without_guidance_show_what_was_asked(pipe, monkeypatch):
    monkeypatch.setattr(LocalControlPipeline, "__call__", quick(LocalControlPipeline.__call__))
    score, _ = prompt_score(pipe, count=60)
    assert score >= 0.85


def quick(call):
    return lambda self, prompt, regions=(), **options: call(self, prompt, regions, **{**CALL, **options})


def test_control_acts_inside_its_mask(pipe):
    mask, errors = box(128, 128, (0, 0, 64, 128)), []
    for i, scene in enumerate(held_out_scenes(12)):
        condition = edges(render(scene, 128))
        drawn = [
            pipe(scene.caption, [Region(condition, mask=mask, scale=scale)], seed=i, **CALL).images[0]
            for scale in (1.0, 0.0)
        ]
        errors.append(
            [lfmse_canny(edges(np.asarray(image)), condition, mask[0, 0].numpy()).inside for image in drawn]
        )
    controlled, free = np.mean(errors, axis=0)
    assert controlled < 0.6 * free


def test_without_it_four_steps_are_too_few():
    plain, scenes = LocalControlPipeline.from_pretrained(), held_out_scenes(20)
    images = plain([scene.caption for scene in scenes], seed=0, **CALL).images
    assert (
        np.mean([shows(np.asarray(image), scene) for image, scene in zip(images, scenes, strict=True)]) < 0.8
    )
