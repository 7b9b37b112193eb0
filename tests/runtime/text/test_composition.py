"""Prompts joined by AND: against the definition, step by step, and each picture as alone."""

import pytest
import torch

from runtime import Region
from runtime.capabilities import Capabilities
from runtime.engines.ports import Profile
from runtime.errors import InputError
from runtime.sampling.request import Request
from runtime.sampling.schedulers import make_scheduler
from runtime.text.composition import Composer, Composition
from runtime.text.encode import encode_guidance
from tests.support.together import LEFT, LIMIT, SHOWN, pipe

NEGATIVE, GUIDANCE, STEPS = "grey", 4.0, 4


def draw(prompt, *regions, **options):
    fixed = {"steps": STEPS, "guidance": GUIDANCE, "negative_prompt": NEGATIVE, "height": 64, "width": 64}
    return pipe()(prompt, regions, **fixed | {"prompt_syntax": "a1111", "seed": 3} | options).latents


def distance(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def by_definition(parts, name):
    """Latents of u + g sum_k w_k (c_k - u), each prompt predicted by a batch of its own, diffusers' steps."""
    own = pipe()
    scheduler = make_scheduler(name, own.model.scheduler)
    scheduler.set_timesteps(STEPS)
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    steps = []
    for text, weight in parts:
        states, pooled = encode_guidance(own.model, [text], [NEGATIVE], True)
        steps.append((own.denoiser.prepare(scheduler.timesteps, states, pooled, ids, None, 1), weight))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    latents = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, t)
        predictions = [(step(torch.cat([sample, sample]), i), weight) for step, weight in steps]
        unguided = predictions[0][0][:1]
        total = unguided + GUIDANCE * sum(weight * (c[1:] - unguided) for c, weight in predictions)
        latents = scheduler.step(total, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("scheduler", ["euler", "unipc"], ids=["in one pass", "the scheduler's own"])
@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red star AND a blue sea", [("a red star", 1), ("a blue sea", 1)]),
        ("a red star :0.7 AND a blue sea:-0.3", [("a red star", 0.7), ("a blue sea", -0.3)]),
        ("a AND b AND c :2", [("a", 1), ("b", 1), ("c", 2)]),
        ("a AND", [("a", 1), ("", 1)]),
    ],
)
def test_is_its_definition(prompt, parts, scheduler):
    assert distance(draw(prompt, scheduler=scheduler), by_definition(parts, scheduler)) < LIMIT


@pytest.mark.filterwarnings("ignore:.*at its end is a weight")
def test_a_single_prompts_weight_multiplies_guidance():
    assert distance(draw("a star :1.5"), draw("a star", guidance=1.5 * GUIDANCE)) < LIMIT
    assert torch.equal(draw("a star :1"), draw("a star"))


@pytest.mark.parametrize("same", ["a star :0.5 AND a star :0.5", "a star AND a blue sea :0"])
def test_what_comes_to_one_prompt(same):
    assert distance(draw(same), draw("a star")) < LIMIT


REGIONS = {
    "none": [],
    "control": [Region(SHOWN, LEFT)],
    "unguided share": [Region(SHOWN, LEFT, uncond_scale=0.2)],
    "words": [Region(mask=LEFT, prompt="a heart")],
    "controlnet": [Region(SHOWN, LEFT, "edges", uncond_scale=0.2), Region(SHOWN, 1 - LEFT, "edges")],
}


@pytest.mark.parametrize("regions", REGIONS)
def test_each_picture_of_a_batch_is_as_alone(regions):
    """The middle one of a single prompt; two pictures of each."""
    prompts = ["a star AND a sea :0.5", "a heart", "a AND b AND c"]
    together = draw(prompts, *REGIONS[regions], images_per_prompt=2)
    alone = [draw(prompts[i // 2], *REGIONS[regions], seed=3 + i) for i in range(6)]
    assert distance(together, torch.cat(alone)) < LIMIT


def test_with_an_empty_negative_prompt_and_an_outside_that_is_held():
    options = {"negative_prompt": "", "outside": "held"}
    found = draw(["a AND b", "c"], Region(SHOWN, LEFT), **options)
    alone = [
        draw(text, Region(SHOWN, LEFT), seed=3 + i, **options) for i, text in enumerate(["a AND b", "c"])
    ]
    assert distance(found, torch.cat(alone)) < LIMIT


def test_rescaled_guidance_and_kept_features():
    for options in ({"guidance_rescale": 0.7}, {"cache_interval": 2}):
        assert distance(draw("a :0.5 AND a :0.5", **options), draw("a", **options)) < LIMIT


@pytest.mark.parametrize("options", [{"guidance": 1.0}, {"guidance_range": (0.0, 0.5)}])
def test_needs_guidance_in_every_step(options):
    with pytest.raises(
        InputError, match="prompt: AND, and the weight of a whole prompt, count in steps with"
    ):
        draw("a AND b", **options)


def test_a_list_of_masks_beside_it_is_refused():
    with pytest.raises(InputError, match="region 1 mask: a list beside prompts joined by AND"):
        draw(["a AND b", "c"], Region(SHOWN, [LEFT, 1 - LEFT]))


def test_words_in_plain_syntax():
    request = Request("a AND b :2")
    assert request.composition.texts == ("a AND b :2",) and request.composition.plain


def test_rows_are_counted():
    request = Request(["a AND b", "c"], prompt_syntax="a1111", images_per_prompt=2)
    assert request.rows(True) == request.most_rows == 4 + 2 * 3
    limit = Capabilities(profile=Profile((1, 2, 4), (64, 64, 64), (64, 64, 64)), side=64)
    with pytest.raises(InputError):
        limit.check(request)
    limit.check(Request(["a", "c"], prompt_syntax="a1111", images_per_prompt=2))


def test_composer():
    composition = Composition((), (), (0, 0, 1), (0.5, 2.0, -1.0))
    composer = Composer(composition, torch.device("cpu"))
    sample, output = torch.randn(2, 4, 3, 3), torch.randn(5, 4, 3, 3)
    assert torch.equal(composer.rows(sample), sample[[0, 1, 0, 0, 1]])
    (u0, u1), (a, b, c) = output[:2], output[2:]
    expected = torch.stack([u0, u1, u0 + 0.5 * (a - u0) + 2 * (b - u0), u1 - (c - u1)])
    torch.testing.assert_close(composer.combine(output), expected)
