"""Words of regions: what each text counts where, and that a mask of 0 lets exactly nothing through."""

from functools import partial

import pytest
import torch

from runtime import LocalControlPipeline, Region
from runtime.control.masks import box
from runtime.control.region import PackedRegion
from runtime.control.words import Words
from runtime.engines.unet_graph import Taken
from runtime.errors import InputError
from runtime.sampling.request import Request
from runtime.sampling.schedulers import SCHEDULERS
from tests.runtime.test_pipeline import PROMPT, condition, latents, pipe
from tests.support.tiny import make_adapter, make_pipeline
from tests.support.tolerances import relative_rms

LEFT, TOP = box(64, 64, (0, 0, 32, 64)), box(64, 64, (0, 0, 64, 32))
WORDS = "a blue star"


def made(*regions: Region, steps: int = 4, images: int = 1) -> Words:
    packed = [PackedRegion(None, region.mask, region) for region in regions]
    return Words.build(packed, [torch.zeros(77, 8)] * len(regions), steps, images)


def shares(words: Words, step: int = 0, rows: int = 1) -> torch.Tensor:
    return words.shares(step, 8, 8, rows, "cpu", torch.float32)


def test_inside_its_mask_a_region_has_all_of_it_and_outside_nothing():
    found = shares(made(Region(prompt="x", mask=LEFT)))[0]
    assert (found[1, :, :4] == 1).all() and (found[0, :, :4] == 0).all()
    assert (found[1, :, 4:] == 0).all() and (found[0, :, 4:] == 1).all()


def test_where_masks_overlap_they_share_by_their_weights():
    words = made(Region(prompt="x", mask=LEFT), Region(prompt="y", mask=TOP, prompt_weight=0.5))
    found = shares(words)[0]
    corner, left, top, rest = found[:, 0, 0], found[:, 7, 0], found[:, 0, 7], found[:, 7, 7]
    assert corner.tolist() == pytest.approx([0, 2 / 3, 1 / 3]) and left.tolist() == [0, 1, 0]
    assert top.tolist() == [0.5, 0, 0.5] and rest.tolist() == [1, 0, 0]
    assert torch.allclose(found.sum(0), torch.ones(8, 8))


def test_negative_prompts_keep_to_themselves():
    found = shares(made(Region(prompt="x", mask=LEFT), images=2), rows=4)
    assert (found[:2, 0] == 1).all() and (found[:2, 1] == 0).all()
    assert torch.equal(found[2], found[3]) and (found[2, 1, :, :4] == 1).all()


def test_words_act_from_start_to_end():
    words = made(Region(prompt="x", mask=LEFT, end=0.5), Region(prompt="y", mask=TOP, start=0.5))
    assert words.segments == [0, 0, 2, 2]
    assert shares(words, 0)[0, :, 7, 0].tolist() == [0, 1, 0]
    assert shares(words, 3)[0, :, 7, 0].tolist() == [1, 0, 0]
    assert shares(words, 3)[0, :, 0, 7].tolist() == [0, 0, 1]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_words_everywhere_are_the_prompt(guidance):
    drawn = latents(Region(prompt=WORDS), guidance=guidance)
    theirs = pipe().model.text_encoders  # the pooled embedding stays the picture's
    assert theirs and relative_rms(drawn, latents(guidance=guidance)) > 1e-3
    same = latents(Region(prompt=PROMPT), guidance=guidance)
    assert relative_rms(same, latents(guidance=guidance)) < 1e-5


@pytest.mark.parametrize("scheduler", [None, *list(SCHEDULERS)[:3]])
@pytest.mark.filterwarnings("ignore:.*all zero")
def test_words_that_nothing_is_left_to_change_no_bit(scheduler):
    free = latents(scheduler=scheduler)
    assert torch.equal(latents(Region(prompt=WORDS, mask=torch.zeros(64, 64)), scheduler=scheduler), free)
    assert torch.equal(latents(Region(prompt=WORDS, prompt_weight=0), scheduler=scheduler), free)
    assert torch.equal(latents(Region(prompt=WORDS, start=0.5, end=0.5), scheduler=scheduler), free)


@torch.inference_mode()
def test_exactly_nothing_of_the_words_is_in_an_attention_where_the_mask_is_0():
    attention = pipe().model.unet.transformer_blocks()[0].attn2
    x = torch.randn(2, 64, attention.to_q.in_features)
    texts = torch.randn(2, 3, 77, attention.to_k.in_features)
    key, value = (t.unflatten(0, (2, 3)) for t in attention.project(texts.flatten(0, 1)))
    mixed = made(Region(prompt="x", mask=LEFT), Region(prompt="y", mask=TOP), images=2)
    found = attention(x, key, value, shares(mixed, rows=2)).unflatten(1, (8, 8))
    alone = [attention(x, key[:, i], value[:, i]).unflatten(1, (8, 8)) for i in range(3)]
    assert torch.equal(found[:, 4:, 4:], alone[0][:, 4:, 4:])
    assert torch.allclose(found[:, 4:, :4], alone[1][:, 4:, :4], atol=1e-6)
    assert torch.allclose(found[:, :4, 4:], alone[2][:, :4, 4:], atol=1e-6)


def test_words_and_control_act_together_in_batches_with_several_prompts():
    regions = [Region(condition(), mask=LEFT, prompt=WORDS), Region(prompt="a red ring", mask=TOP)]
    both = pipe()([PROMPT, "snow"], regions, steps=3, seed=3, images_per_prompt=2).latents
    second = pipe()("snow", regions, steps=3, seed=5, images_per_prompt=2).latents
    assert relative_rms(both[2:], second) < 1e-5
    for left_out in (regions[:1], regions[1:], [Region(condition(), mask=LEFT), regions[1]]):
        other = pipe()("snow", left_out, steps=3, seed=5, images_per_prompt=2).latents
        assert relative_rms(other, second) > 1e-4


@pytest.mark.parametrize(
    ("prompt", "counts"), [(WORDS, (2, 0)), (" ".join(["a star"] * 60), (1,))], ids=["short", "long"]
)
def test_compiled_is_the_same(prompt, counts):
    """counts: of the regions; each is traced for many seconds."""
    regions = [Region(prompt=prompt, mask=LEFT, end=0.7), Region(condition(), mask=TOP, prompt="snow")]
    options = {"steps": 4, "seed": 3, "guidance_range": (0, 0.5)}
    compiled = LocalControlPipeline.from_diffusers(make_pipeline(), {"canny": make_adapter()})
    compiled.compile(compiler="eager")
    draw = partial(compiled, PROMPT, **options)
    for count in counts:
        drawn, plain = draw(regions[:count]).latents, pipe()(PROMPT, regions[:count], **options).latents
        assert relative_rms(drawn, plain) < 1e-5, count


def test_cached_features_are_computed_anew_where_the_words_change():
    cached = partial(latents, Region(prompt=WORDS, mask=LEFT, end=0.5), steps=4)
    assert torch.equal(cached(cache_interval=2), cached(cache_interval=2))
    # two steps with words, two without: an interval of 4 is one of 2
    assert torch.equal(cached(cache_interval=4), cached(cache_interval=2))


def test_long_words_leave_the_reference_as_it_is():
    long = Region(prompt=" ".join(["a star"] * 60), mask=LEFT)
    drawn = pipe()(PROMPT, [long], steps=3, seed=3, outside="held", output_type="pt")
    assert torch.equal(drawn.reference.pixels, pipe()(PROMPT, steps=3, seed=3, output_type="pt").images)


def test_words_are_held_inside_their_mask():
    drawn = pipe()(
        PROMPT, [Region(prompt=WORDS, mask=LEFT)], steps=4, seed=3, outside="held", output_type="pt"
    )
    assert torch.equal(drawn.images[..., 32:], drawn.reference.pixels[..., 32:])
    assert not torch.equal(drawn.images[..., :32], drawn.reference.pixels[..., :32])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "condition is missing, and so is a prompt; expected a picture, words, or both"),
        ({"prompt": "  "}, "prompt '  '; expected words"),
        ({"prompt": 3}, "prompt 3; expected words"),
        ({"prompt": "x", "prompt_weight": 1.5}, "prompt_weight 1.5; expected a number from 0 to 1"),
        ({"prompt": "x", "prompt_weight": "much"}, "prompt_weight 'much'; expected a finite number"),
        ({"condition": condition(), "prompt_weight": 0.5}, "prompt_weight 0.5 without a prompt"),
        (
            {"prompt": "x", "preprocess": "canny"},
            "preprocess 'canny' without a condition; expected a picture",
        ),
        (
            {"prompt": "x", "mask_condition": True},
            "mask_condition True without a condition; expected a picture",
        ),
        ({"prompt": "x", "mask_condition": "maybe"}, "mask_condition 'maybe'; expected true or false"),
        (
            {"prompt": "x", "scale": 0.3},
            "scale 0.3 without a condition; expected a picture; prompt_weight is the str",
        ),
        ({"prompt": "x", "levels": (1, 1, 1, 0)}, "levels (1, 1, 1, 0) without a condition"),
    ],
)
def test_bad_fields_are_named(fields, said):
    with pytest.raises(InputError) as caught:
        Region(**fields)
    assert said in str(caught.value)


def test_the_syntax_of_words_is_the_prompts():
    Request("x", [Region(prompt="a (red:1.3) vase")], prompt_syntax="a1111")
    with pytest.raises(InputError, match="region 1: prompt"):
        Request("x", [Region(prompt="a AND b")], prompt_syntax="a1111")
    with pytest.raises(InputError, match="region 1: prompt 'BREAK'; expected words"):
        Request("x", [Region(prompt="BREAK")], prompt_syntax="a1111")


def test_a_dictionary_may_not_leave_words_blank_or_name_an_adapter_for_them():
    for fields, said in (
        ({"condition": "a.png", "prompt": ""}, "region 2: prompt ''; expected words"),
        ({"prompt": "a", "adapter": "depth"}, "region 2: adapter 'depth' without a condition"),
    ):
        with pytest.raises(InputError, match=said):
            Region.from_dict(fields, "region 2")


def test_too_many_words_are_named_by_their_region():
    with pytest.raises(InputError, match="region 1: prompt: .* tokens; expected at most"):
        latents(Region(prompt="a star " * 5000))


def test_masks_of_words_are_resized_as_asked():
    mask = box(64, 64, (0, 0, 37, 64))
    area, nearest = (latents(Region(prompt=WORDS, mask=mask), mask_resize=m) for m in ("area", "nearest"))
    assert not torch.equal(area, nearest)


LONG = " ".join(["a red star and a blue circle"] * 12)  # two chunks


@pytest.mark.parametrize(
    "off", [{"mask": torch.zeros(64, 64)}, {"prompt_weight": 0}, {"start": 0.5, "end": 0.5}], ids=str
)
@pytest.mark.filterwarnings("ignore:.*all zero")
def test_long_words_that_are_off_change_no_bit(off):
    assert torch.equal(latents(Region(prompt=LONG, **off)), latents())


def test_a_text_twice_over_is_the_text():
    words = Words([torch.randn(154, 8), torch.randn(77, 8)], [LEFT, TOP], torch.ones(4, 2), 1)
    text = torch.randn(2, 77, 8)
    both = words.beside(text)
    assert both.shape == (2, 3, 154, 8)
    assert torch.equal(both[:, 0], text.repeat(1, 2, 1)) and torch.equal(both[0, 1], words.states[0])
    everywhere = latents(
        Region(prompt=PROMPT), Region(prompt=LONG, mask=box(64, 64, (0, 0, 1, 1)), prompt_weight=1e-6)
    )
    assert relative_rms(everywhere, latents()) < 1e-4


def test_the_negative_prompt_says_nothing_without_guidance():
    region = Region(prompt=WORDS, mask=LEFT)
    assert torch.equal(latents(region, guidance=1, negative_prompt=LONG), latents(region, guidance=1))


def test_what_warms_up_compiles_the_graph_with_words_too():
    compiled = LocalControlPipeline.from_diffusers(make_pipeline(), {"canny": make_adapter()})
    compiled.compile(compiler="eager")
    request = Request(PROMPT, [Region(prompt=WORDS, mask=LEFT)], height=64, width=64, guidance=1)
    compiled.warm_up(request=request)
    assert list(compiled.denoiser.variants[Taken(words=True)]._compiled) == [2]
