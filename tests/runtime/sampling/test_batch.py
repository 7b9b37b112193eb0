"""runtime.sampling.batch: requests that share the UNet's calls are each drawn as by themselves."""

from functools import cache

import pytest
import torch

from runtime import Cancelled, LocalControlPipeline, Region
from runtime.sampling.batch import tick
from runtime.sampling.drawing import Drawing
from runtime.sampling.request import Request
from runtime.sampling.torch_step import Part
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
def alone(name):
    return pipe().draw(REQUESTS[name])


@torch.inference_mode()
def drawn_together(requests, late=()):
    """Results of requests; those of `late` join when the others have taken two steps."""
    drawings = {name: Drawing(pipe(), REQUESTS[name]) for name in (*requests, *late)}
    results, waiting, ticks = {}, list(late), 0
    active = {name: drawings[name].runs() for name in requests}
    running = {name: next(runs) for name, runs in active.items()}
    while running or waiting:
        if ticks == 2 or not running:
            for name in waiting:
                active[name] = drawings[name].runs()
                running[name] = next(active[name])
            waiting = []
        assert not tick(pipe().denoiser, list(running.values()))
        ticks += 1
        for name in [name for name, run in running.items() if run.done]:
            try:
                running[name] = next(active[name])
            except StopIteration:
                del running[name]
                results[name] = drawings[name].result
    return results, ticks


def assert_as_alone(results):
    for name, result in results.items():
        expected = alone(name).latents
        assert result.latents.shape == expected.shape
        error = float((result.latents - expected).abs().max() / expected.abs().max())
        assert error < LIMIT, (name, error)


def test_everything_at_once():
    results, ticks = drawn_together(REQUESTS)
    assert results.keys() == REQUESTS.keys()
    assert_as_alone(results)
    assert ticks == 8  # of the longest: "held" takes two runs of four


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "plain"])
def test_each_beside_a_plain_one(name):
    results, _ = drawn_together(["plain", name])
    assert_as_alone(results)


def test_a_request_joins_between_steps():
    results, ticks = drawn_together(["plain", "control"], late=["words", "other steps"])
    assert_as_alone(results)
    assert ticks == 2 + 7


def test_rows_share_one_call(monkeypatch):
    """Three requests, one of them without guidance and one of two pictures: one forward pass a step."""
    calls, unet = [], pipe().model.unet
    forward = type(unet).forward

    def counted(self, sample, *given):
        calls.append(len(sample))
        return forward(self, sample, *given)

    monkeypatch.setattr(type(unet), "forward", counted)
    drawn_together(["plain", "no guidance", "two pictures"])
    assert calls == [2 + 1 + 4] * 3 + [2 + 4]


def test_what_goes_wrong_with_one_leaves_the_others():
    def cancel(at):
        if at.step == 2:
            at.cancel()

    good, bad = Drawing(pipe(), REQUESTS["plain"]), Drawing(pipe(), REQUESTS["control"], cancel)
    with torch.inference_mode():
        drawings = good.runs(), bad.runs()
        runs = [next(runs) for runs in drawings]
        assert not tick(pipe().denoiser, runs)
        failed = tick(pipe().denoiser, runs)
        assert list(failed) == [runs[1]] and isinstance(failed[runs[1]], Cancelled)
        while not runs[0].done:
            tick(pipe().denoiser, runs[:1])
        next(drawings[0], None)
    assert_as_alone({"plain": good.result})


def test_a_part_alone_is_its_own_step():
    with torch.inference_mode():
        run = next(Drawing(pipe(), REQUESTS["control"]).runs())
        expected = run.step(run.sample(), 0)
        (found,) = pipe().denoiser.together([Part(run.step, run.sample(), 0)])
    assert torch.equal(found, expected)
