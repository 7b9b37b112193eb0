"""runtime.sampling.rehearsals: every kind of step that a request has is there, and no more."""

import torch
from PIL import Image

from runtime.control.region import Region
from runtime.sampling.rehearsals import rehearsals
from runtime.sampling.request import Request


def test_a_step_of_each_kind():
    plain = rehearsals(Request("x", steps=30), (64, 96), ())
    assert [each.guided_steps(each.steps) for each in plain] == [[True]]
    assert (plain[0].height, plain[0].width, plain[0].regions) == (64, 96, ())
    mixed = rehearsals(Request("x", steps=30, guidance_range=(0.0, 0.5)), (64, 64), ())
    assert [each.guided_steps(each.steps) for each in mixed] == [[True, False]]
    free = rehearsals(Request("x", steps=30, guidance=1.0), (64, 64), ())
    assert [each.guided_steps(each.steps) for each in free] == [[False]]


def test_words_and_controlnets_have_steps_of_their_own():
    photo = Image.new("L", (64, 64))
    regions = [Region(prompt="a star"), Region(photo, adapter="net"), Region(photo, adapter="canny")]
    drawn = rehearsals(Request("x", regions), (64, 64), ("net", "other"))
    assert [[r.adapter for r in each.regions if r.condition is not None] for each in drawn] == [
        [],
        [],
        ["net"],
    ]
    assert [len(each.words) for each in drawn] == [0, 1, 1]


def test_what_only_its_picture_needs_is_left_out():
    image = Image.new("RGB", (64, 64))
    noise, one = torch.randn(1, 4, 8, 8), torch.Generator().manual_seed(1)
    whole = Request(
        "x", image=image, strength=0.5, outside="held", latents=noise, generator=one, cache_interval=3
    )
    (once,) = rehearsals(whole, (64, 64), ())
    assert (once.image, once.outside, once.latents, once.generators) == (None, "free", None, None)
    assert (once.steps, once.cache_interval, once.seed) == (1, 1, 0)
