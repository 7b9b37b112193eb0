"""The outside held: bit for bit the reference where no mask is, and one run where the reference is kept."""

import dataclasses
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import LocalControlPipeline, Region
from runtime.control.masks import box, circle, feather
from runtime.errors import InputError
from runtime.sampling import held
from runtime.sampling.request import Request
from runtime.sampling.schedulers import SCHEDULERS
from tests.runtime.test_pipeline import PROMPT, condition, pipe
from tests.support import engines
from tests.support.tiny import make_adapter, make_pipeline

PHOTO = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 77, 3), dtype=np.uint8))
LEFT = box(64, 64, (0, 0, 37, 64))
OTHER_MASKS = {
    "soft": feather(circle(64, 64, (30, 33), 25), 12),
    "strokes of a pixel": box(64, 64, (0, 31, 64, 32)),
    "a pixel": box(64, 64, (9, 9, 10, 10)),
    "faint": box(64, 64, (10, 10, 50, 60)) * 0.3,
}


def draw(regions=None, **options):
    regions = [Region(condition(), mask=LEFT)] if regions is None else regions
    given = {"steps": 4, "output_type": "pt", "outside": "held"} | options
    if not {"seed", "generator", "reference"} & given.keys():
        given["seed"] = 3
    return pipe()(given.pop("prompt", PROMPT), regions, **given)


def outside(pixels: torch.Tensor, mask: torch.Tensor = LEFT) -> torch.Tensor:
    return pixels.movedim(1, -1)[(mask == 0).squeeze(1).expand(len(pixels), -1, -1)]


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "PNDMScheduler"])
def test_outside_is_the_uncontrolled_picture_with_every_scheduler(scheduler):
    drawn = draw(scheduler=scheduler)
    free = draw([], scheduler=scheduler, outside="free")
    controlled = draw(scheduler=scheduler, outside="free")
    assert torch.equal(drawn.reference.pixels, free.images)
    assert torch.equal(outside(drawn.images), outside(free.images))
    assert torch.equal(drawn.latents[..., 5:], free.latents[..., 5:])  # 37 px are 4.6 cells
    assert not torch.equal(outside(controlled.images), outside(free.images))
    assert not torch.equal(drawn.latents[..., :5], free.latents[..., :5])


@pytest.mark.parametrize("mask", OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_any_mask_keeps_every_pixel_that_it_does_not_touch(mask):
    drawn = draw([Region(condition(), mask=mask)])
    assert torch.equal(outside(drawn.images, mask), outside(drawn.reference.pixels, mask))


def test_several_regions_hold_what_none_of_them_covers():
    masks = box(64, 64, (0, 0, 20, 30)), feather(circle(64, 64, (45, 45), 10), 3)
    drawn = draw([Region(condition(), mask=masks[0]), Region(condition(1), mask=masks[1], end=0.5)])
    both = torch.maximum(*masks)
    assert torch.equal(outside(drawn.images, both), outside(drawn.reference.pixels, both))
    alone = draw([Region(condition(), mask=masks[0])])
    assert not torch.equal(outside(drawn.images, masks[0]), outside(alone.images, masks[0]))


def test_a_batch_holds_each_picture_to_its_own_reference():
    options = {"prompt": [PROMPT, "a blue star"], "images_per_prompt": 2, "seed": 3}
    drawn, free = draw(**options), draw([], outside="free", **options)
    assert torch.equal(outside(drawn.images), outside(free.images))
    assert len({x.sum().item() for x in drawn.images}) == 4


def test_where_everything_is_covered_nothing_is_held():
    assert torch.equal(
        draw([Region(condition(), mask=torch.ones(64, 64))]).images,
        draw([Region(condition(), mask=torch.ones(64, 64))], outside="free").images,
    )
    with pytest.warns(UserWarning, match="outside held: region 1 has no mask, so nothing is outside"):
        everywhere = draw([Region(condition())])
    assert torch.equal(everywhere.images, draw([Region(condition())], outside="free").images)


def test_without_regions_it_is_the_reference_that_the_next_call_takes():
    first = draw([])
    assert torch.equal(first.images, draw([], outside="free").images)
    assert draw(reference=first.reference).reference is first.reference
    again = draw([], reference=first.reference, on_step=lambda _: pytest.fail("a step was run"))
    assert torch.equal(again.images, first.images) and torch.equal(again.latents, first.latents)


def test_without_regions_one_run_draws_the_reference():
    steps, made = [], [torch.Generator().manual_seed(3) for _ in range(2)]
    options = {"scheduler": "euler_a", "generator": made[0]}
    drawn = draw([], on_step=lambda at: steps.append((at.step, at.steps)), **options)
    free = draw([], outside="free", scheduler="euler_a", generator=made[1])
    assert steps == [(i, 4) for i in (1, 2, 3, 4)] and torch.equal(drawn.images, free.images)
    assert torch.equal(made[0].get_state(), made[1].get_state())


def test_a_reference_is_used_again_for_another_region():
    first = draw()
    steps = []
    second = draw(
        [Region(condition(1), mask=1 - LEFT)],
        reference=first.reference,
        on_step=lambda at: steps.append((at.step, at.steps)),
    )
    assert second.reference is first.reference and steps == [(i, 4) for i in (1, 2, 3, 4)]
    assert second.seed == 3 and "reference" in first.timings and "reference" not in second.timings
    assert torch.equal(second.images, draw([Region(condition(1), mask=1 - LEFT)]).images)
    assert torch.equal(outside(second.images, 1 - LEFT), outside(first.reference.pixels, 1 - LEFT))


def test_both_runs_count_as_progress():
    steps = []
    draw(on_step=lambda at: steps.append((at.step, at.steps)))
    assert steps == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a blue star"},
        {"negative_prompt": "blurred"},
        {"steps": 5},
        {"guidance": 4.0},
        {"height": 48},
        {"scheduler": "ddim"},
        {"latents": torch.zeros(1, 4, 8, 8)},
        {"guidance_range": (0, 0.5)},
        {"guidance_rescale": 0.5},
        {"cache_interval": 2},
        {"clip_skip": 1},
        {"images_per_prompt": 2},
        {"prompt_syntax": "a1111", "prompt": "a (red:1.3) circle on sand"},
        {"image": PHOTO},
        {"generator": torch.Generator().manual_seed(3)},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.filterwarnings("ignore:.*aspect ratio")
def test_another_setting_makes_the_reference_anew(changes):
    first = draw()
    if "generator" not in changes:
        changes = changes | {"seed": 3}
    again = draw(**changes, reference=first.reference)
    assert again.reference is not first.reference
    if "image" not in changes:
        assert again.reference.settings != first.reference.settings


def test_every_field_of_a_request_counts_or_is_known_to_say_nothing_about_the_outside():
    counted = {field.name for field in dataclasses.fields(Request)} - held.INSIDE
    assert counted == {
        *("prompt", "negative_prompt", "steps", "guidance", "images_per_prompt", "scheduler", "latents"),
        *("guidance_range", "guidance_rescale", "cache_interval", "prompt_syntax", "clip_skip"),
        *("image", "strength"),
    }


def test_another_model_makes_the_reference_anew():
    other = LocalControlPipeline.from_diffusers(make_pipeline(seed=1), {"canny": make_adapter()})
    first = draw()
    drawn = other(
        PROMPT, [Region(condition(), mask=LEFT)], steps=4, outside="held", reference=first.reference
    )
    assert drawn.reference is not first.reference and drawn.seed == 3


@pytest.mark.parametrize("scheduler", ["euler", "euler_a", "dpm++2m_sde"])
def test_a_generator_gives_both_runs_the_same_numbers(scheduler):
    made = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = draw(generator=made[0], scheduler=scheduler)
    free = draw([], generator=made[1], scheduler=scheduler, outside="free")
    assert torch.equal(outside(drawn.images), outside(free.images))
    assert torch.equal(made[0].get_state(), made[1].get_state())


def test_latents_alone_leave_the_pixels_of_the_reference_for_later():
    first = draw(output_type="latent")
    assert first.images == [] and first.reference.pixels is None and first.reference.images == []
    second = draw(reference=first.reference)
    assert torch.equal(second.images, draw().images) and "reference" in second.timings


@pytest.mark.parametrize("size", [(77, 50), (64, 64), (33, 90), (5, 3)], ids=str)
@pytest.mark.parametrize("scheduler", ["euler", "lcm", "heun"])
@pytest.mark.filterwarnings("ignore:.*aspect ratio")
def test_a_given_picture_keeps_its_own_pixels_and_size(size, scheduler):
    photo = PHOTO.resize(size, Image.Resampling.NEAREST)
    mask = np.zeros(size[::-1], np.float32)
    mask[: size[1] // 2, : size[0] // 2] = 1
    drawn = draw(
        [Region(condition(), mask=mask)],
        image=photo,
        strength=0.8,
        steps=5,
        scheduler=scheduler,
        output_type="pil",
        images_per_prompt=2,
    )
    for image in drawn.images:
        assert image.size == size
        differs = (np.asarray(image) != np.asarray(photo)).any(axis=2)
        assert not differs[mask == 0].any() and differs[mask == 1].any()


def test_a_given_picture_resized_is_held_at_that_size():
    photo = PHOTO.resize((128, 128))
    drawn = draw(image=photo, height=64, width=64)
    assert drawn.images.shape[2:] == (64, 64)
    assert torch.equal(outside(drawn.images), outside(drawn.reference.pixels))


def test_the_steps_of_a_given_picture_end_without_noise():
    drawn = draw(image=PHOTO.resize((64, 64)), strength=0.5)
    assert len(drawn.reference.trajectory) == 2
    latents = drawn.latents[..., 5:]
    assert torch.equal(latents, drawn.reference.trajectory[-1][..., 5:])


def test_engines_hold_the_outside_too():
    engine = LocalControlPipeline.from_engine(engines.folder("onnxruntime"))
    options = {"steps": 4, "seed": 3, "output_type": "pt"}
    drawn = engine(PROMPT, [Region(condition(), mask=LEFT)], outside="held", **options)
    assert torch.equal(outside(drawn.images), outside(engine(PROMPT, **options).images))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"outside": "kept"}, "outside 'kept': expected free, held"),
        (
            {"reference": 3, "outside": "held"},
            "reference: a int; expected the `reference` of an earlier result",
        ),
        ({"reference": "made"}, "reference: given with outside 'free'; expected outside 'held'"),
        (
            {"reference": "made", "outside": "held", "seed": 4},
            "reference: of seed 3, and the request has seed 4; expected the same",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(given, said):
    if given.get("reference") == "made":
        given = given | {"reference": draw([]).reference}
    with pytest.raises(InputError) as caught:
        Request("x", **given)
    assert said in str(caught.value)


def test_latents_turn_into_the_references_over_the_pixels_of_one():
    reference = held.Reference(None, [torch.zeros(1, 4, 8, 8)], 3, False, "", None)
    weights = held.Held(LEFT, (64, 64), reference)(torch.ones(1, 4, 8, 8), 0)[0, 0, 0]
    assert weights.tolist() == pytest.approx([1, 1, 1, 0.93, 0.195, 0, 0, 0], abs=1e-3)
    whole = held.Held(torch.ones(1, 1, 61, 64), (64, 64), reference)(torch.ones(1, 4, 8, 8), 0)
    assert (whole == 1).all()  # the picture's own border is none of the mask's


def test_pixels_are_composed_inwards_only():
    ours, theirs = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    made = held.compose(ours, theirs, LEFT, 8)
    assert torch.equal(outside(made), outside(theirs)) and torch.equal(made[..., :33], ours[..., :33])
    ramp = ((made - theirs) / (ours - theirs))[..., 33:37]
    assert (ramp.diff(dim=-1) < 0).all()


def test_a_warning_is_given_once_where_nothing_is_outside():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw([Region(condition()), Region(condition(), mask=LEFT)])
    assert [str(w.message) for w in caught if "outside" in str(w.message)] == [
        "outside held: region 1 has no mask, so nothing is outside"
    ]


def test_a_given_picture_without_regions_is_refused():
    with pytest.raises(InputError, match="outside held: no region, so nothing of the image may change"):
        draw([], image=PHOTO)


def test_a_reference_of_another_picture_size_is_made_anew():
    photo = PHOTO.resize((40, 40))  # is drawn at 48 x 48, and cropped
    region = [Region(condition(), mask=LEFT)]
    first = draw(region, image=photo)
    second = draw(region, image=photo, height=48, width=48, reference=first.reference)
    assert second.images.shape[2:] == (48, 48) and first.images.shape[2:] == (40, 40)


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_results_own_their_memory(output_type):
    drawn = draw([], output_type=output_type)
    assert drawn.latents is not drawn.reference.trajectory[-1]
    before = drawn.reference.pixels.clone()
    if output_type == "np":
        drawn.images *= 0.5
    with torch.inference_mode():
        drawn.images *= 0.5
        drawn.latents *= 0.5
    assert torch.equal(drawn.reference.pixels, before)
    assert torch.equal(draw(reference=drawn.reference).images, draw().images)


@pytest.mark.parametrize("kind", ["float", "grey", "16 bit"])
def test_a_given_picture_is_held_as_it_was_given(kind):
    given = np.random.default_rng(2).random((64, 64) if kind == "grey" else (64, 64, 3)).astype(np.float32)
    if kind == "16 bit":
        given = (given * 65535).astype(np.uint16)
    drawn = draw(image=given, output_type="np").images[0][:, 37:]
    expected = given / np.float32(65535) if kind == "16 bit" else given
    expected = np.broadcast_to(expected.reshape(64, 64, -1), (64, 64, 3))
    assert np.array_equal(drawn, expected[:, 37:])


def test_a_reference_of_a_generator_asks_for_it():
    first = draw(generator=torch.Generator().manual_seed(5))
    with pytest.raises(InputError, match="reference: drawn with a generator; expected the same one"):
        draw(reference=first.reference)
    again = draw(reference=first.reference, generator=torch.Generator().manual_seed(5))
    assert again.reference is first.reference


def test_a_result_goes_through_pickle_and_its_reference_fits_no_more():
    first = draw()
    sent = pickle.loads(pickle.dumps(first))
    assert torch.equal(sent.reference.pixels, first.reference.pixels)
    again = draw(reference=sent.reference)
    assert again.reference is not sent.reference and torch.equal(again.images, first.images)


@pytest.mark.parametrize(("asked", "size"), [({"height": 64}, (64, 80)), ({"width": 32}, (32, 32))])
def test_one_side_that_is_asked_for_gives_the_other(asked, size):
    photo = PHOTO.resize((90, 72) if "height" in asked else (70, 70))
    assert draw(image=photo, **asked).images.shape[2:] == size


def test_warming_up_takes_a_held_request():
    photo = PHOTO.resize((64, 64))
    pipe().warm_up(64, 64, outside="held", image=photo, steps=2)
    pipe().warm_up(request=Request("x", [Region(prompt="a star", mask=LEFT)], outside="held", image=photo))
