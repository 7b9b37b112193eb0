"""Requests of many kinds, drawn at once on one pipeline, against each by itself."""

from functools import cache

import torch

from runtime import LocalControlPipeline, Region
from runtime.sampling.batch import Batch
from runtime.sampling.drawing import Drawing
from runtime.sampling.request import Request
from tests.support.tiny import make_adapter, make_controlnet, make_pipeline

LIMIT = 1e-4  # of latents whose spread is 1 to 30: what joined rows may differ by
LEFT = torch.zeros(1, 1, 64, 64)
LEFT[..., :32] = 1
SHOWN = (torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(5)) > 0.8).float()


@cache
def pipe():
    base = make_pipeline()
    sources = {"canny": make_adapter(), "edges": make_controlnet(base.unet)}
    return LocalControlPipeline.from_diffusers(base, sources)


def request(prompt="a red star", regions=(), **options):
    size = {} if "image" in options else {"height": 64, "width": 64}
    return Request(prompt, list(regions), output_type="latent", **size | {"steps": 4, "seed": 3} | options)


REQUESTS = {
    "plain": request(),
    "other steps": request("a blue square", steps=7, seed=9),
    "no guidance": request(guidance=1.0, steps=3),
    "guidance at times": request(guidance_range=(0.3, 0.8), steps=6),
    "control": request(regions=[Region(SHOWN, LEFT, scale="0:1,0.5:0.2")], steps=5),
    "another share unguided": request(regions=[Region(SHOWN, LEFT, uncond_scale=0.3)]),
    "two pictures": request(regions=[Region(SHOWN, LEFT)], images_per_prompt=2, scheduler="euler_a"),
    "two prompts": request(["a", "b"], scheduler="heun"),
    "a mask each": request(regions=[Region(SHOWN, [LEFT, 1 - LEFT])], images_per_prompt=2),
    "words, a mask each": request(
        ["a", "b"], [Region(mask=[LEFT, 1 - LEFT], prompt="a heart", prompt_weight="0:1,1:0")]
    ),
    "controlnet, a mask each": request(
        regions=[Region([SHOWN, 1 - SHOWN], [LEFT, 1 - LEFT], "edges", uncond_scale=0.5)], images_per_prompt=2
    ),
    "joined by AND": request(
        "a star AND a sea :0.5", [Region(SHOWN, LEFT, uncond_scale=0.5)], prompt_syntax="a1111"
    ),
    "words": request(regions=[Region(mask=LEFT, prompt="a green heart")], steps=5),
    "two words": request(
        regions=[Region(mask=LEFT, prompt="a heart"), Region(mask=1 - LEFT, prompt="a circle", end=0.5)]
    ),
    "long prompt": request(" ".join(["a red star"] * 40)),
    "long words": request(regions=[Region(mask=LEFT, prompt=" ".join(["a heart"] * 60))]),
    "controlnet": request(regions=[Region(SHOWN, LEFT, "edges", end=0.6)], steps=5),
    "controlnet and control": request(regions=[Region(SHOWN, LEFT, "edges"), Region(SHOWN, 1 - LEFT)]),
    "held": request(regions=[Region(SHOWN, LEFT)], outside="held"),
    "image": request(image=torch.rand(1, 3, 64, 64), strength=0.5, steps=8),
    "cached": request(cache_interval=2, steps=5),
    "other size": request(height=80, width=48),
}  # fmt: skip


@cache
def alone(pipe, name):
    return pipe.draw(REQUESTS[name])


@torch.inference_mode()
def drawn_together(pipe, requests, late=()):
    """Results of requests, and the ticks they took; those of `late` join when the others have taken two steps."""
    drawings = {name: Drawing(pipe, REQUESTS[name]) for name in (*requests, *late)}
    results, waiting, ticks, batch = {}, list(late), 0, Batch(pipe.denoiser)
    active = {name: drawings[name].runs() for name in requests}
    running = {name: next(runs) for name, runs in active.items()}
    while running or waiting:
        if ticks == 2 or not running:
            for name in waiting:
                active[name] = drawings[name].runs()
                running[name] = next(active[name])
            waiting = []
        assert not batch.tick(list(running.values()))
        ticks += 1
        for name in [name for name, run in running.items() if run.done]:
            try:
                running[name] = next(active[name])
            except StopIteration:
                del running[name]
                results[name] = drawings[name].result
    return results, ticks


def assert_as_alone(pipe, results):
    for name, result in results.items():
        expected = alone(pipe, name).latents
        assert result.latents.shape == expected.shape
        error = float((result.latents - expected).abs().max() / expected.abs().max())
        assert error < LIMIT, (name, error)
