"""runtime.sampling.unused: what is asked for and no step does is one line that names it."""

import warnings

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from runtime.control.region import Region
from runtime.sampling.request import Request

PICTURE = torch.ones(16, 16)


def said(*regions: Region, **settings) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, of what diffusers calls
        Request("x", regions, **settings)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "when",
    [{"start": 1}, {"start": 0.5, "end": 0.5}, {"end": 0}],
    ids=str,
)
def test_a_region_that_acts_in_no_step_is_named(when):
    (line,) = said(Region(PICTURE, **when), steps=4)
    assert line.startswith("region 1: start ") and line.endswith(
        "it acts in no step, so the region has no control"
    )
    (line,) = said(Region(prompt="a star", **when, label="sky"), steps=4)
    assert line.startswith("sky: start ") and line.endswith("so the region has no words")


def test_regions_that_act_are_not_named():
    assert (
        said(Region(PICTURE), Region(PICTURE, start=0.5), Region(PICTURE, start=0.1, end=0.2), steps=4) == []
    )


@pytest.mark.parametrize("unguided", [{"guidance": 1}, {"guidance_range": (0.5, 0.5)}], ids=str)
def test_settings_of_a_guidance_that_no_step_has_are_named(unguided):
    rest = "no step has guidance, so it does nothing; expected guidance above 1, in some step"
    assert said(negative_prompt="blur", **unguided) == [f"negative_prompt: {rest}"]
    assert said(guidance_rescale=0.7, **unguided) == [f"guidance_rescale: {rest}"]
    assert said(**unguided) == said(negative_prompt="blur", guidance_rescale=0.7) == []


def test_a_guidance_range_without_a_step_is_named():
    expected = (
        "guidance_range 0.4 0.6: no whole step of 2 is in it, so the picture has no guidance; expected a wider one, or "
        "more steps"
    )
    assert said(guidance_range=(0.4, 0.6), steps=2) == [expected]
    assert (
        said(guidance_range=(0.4, 0.6), steps=20)
        == said(guidance_range=(0.4, 0.6), steps=2, guidance=1)
        == []
    )


@pytest.mark.parametrize("scheduler", ["heun", "KDPM2DiscreteScheduler", HeunDiscreteScheduler()])
def test_steps_that_a_scheduler_makes_two_of_count_as_two(scheduler):
    """Of 7 steps the first ends at 0.14; of 4 at 0.25."""
    narrow = {"steps": 4, "scheduler": scheduler, "guidance_range": (0.0, 0.2)}
    assert said(Region(PICTURE, uncond_scale=0.5), negative_prompt="blur", **narrow) == []
    assert Request("x", **narrow).most_rows == 2 and Request("x", **narrow).run_steps == 7
    assert Request("x", steps=4, scheduler=scheduler, image=PICTURE, strength=0.5).run_steps == 3
    (line,) = said(**narrow | {"guidance_range": (0.0, 0.1)})
    assert "no whole step of 7 is in it" in line
