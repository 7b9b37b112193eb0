"""runtime.control.residuals: ControlNets inside masks, against diffusers' pipeline and the uncontrolled picture."""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLControlNetUnionPipeline
from PIL import Image

from runtime import LocalControlPipeline, Region
from runtime.control.region import pack
from runtime.control.residuals import Residuals
from runtime.engines.unet_graph import Taken
from runtime.errors import InputError
from runtime.model.controlnet import ControlNet
from runtime.sampling.request import Request
from tests.support.tiny import make_adapter, make_controlnet, make_pipeline, make_union
from tests.support.tolerances import assert_close

PROMPT, CALL = "a red star", {"steps": 5, "seed": 3, "height": 64, "width": 80}
SIZE = 64, 80
LIMIT = 1e-3  # of the latents, whose spread is about 1


@cache
def base():
    return make_pipeline()


@cache
def pipe():
    """One with two ControlNets, a union and an adapter."""
    union = make_union(base().unet)
    return LocalControlPipeline.from_diffusers(
        base(),
        {
            "edges": make_controlnet(base().unet),
            "other": make_controlnet(base().unet, seed=1),
            "depth": union,
            "canny-2": union,
            "sketch": make_adapter(),
        },
    )


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def left_half():
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., : SIZE[1] // 2] = 1
    return mask


def draw(regions=(), **more):
    return pipe()(PROMPT, list(regions), output_type="latent", **CALL | more).latents


@cache
def free():
    return draw()


def diffusers(kind, net, **more):
    theirs = kind(**base().components, controlnet=net, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, SIZE[0] // 8, SIZE[1] // 8, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 5, "height": SIZE[0], "width": SIZE[1], "latents": noise}
    call |= {"output_type": "latent", "guidance_scale": 5.0}
    return theirs(PROMPT, **call | more).images


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, *SIZE)], ids=["no mask", "ones"])
@pytest.mark.parametrize(("scale", "start", "end"), [(1.0, 0, 1), (0.6, 0.2, 0.8)])
def test_everywhere_it_is_diffusers(mask, scale, start, end):
    region = Region(picture(), mask, "edges", scale=scale, start=start, end=end)
    expected = diffusers(
        StableDiffusionXLControlNetPipeline,
        make_controlnet(base().unet),
        image=picture(),
        controlnet_conditioning_scale=scale,
        control_guidance_start=start,
        control_guidance_end=end,
    )
    assert (draw([region]) - expected).abs().max() < LIMIT
    assert (free() - expected).abs().max() > 30 * LIMIT


@pytest.mark.parametrize(("name", "number"), [("depth", 1), ("canny-2", 3)])
def test_a_union_is_diffusers_under_the_name_of_its_control(name, number):
    expected = diffusers(
        StableDiffusionXLControlNetUnionPipeline,
        make_union(base().unet),
        control_image=[picture()],
        control_mode=[number],
        controlnet_conditioning_scale=1.0,
    )
    assert (draw([Region(picture(), adapter=name)]) - expected).abs().max() < LIMIT


def test_two_of_them_are_diffusers():
    expected = diffusers(
        StableDiffusionXLControlNetPipeline,
        [make_controlnet(base().unet), make_controlnet(base().unet, seed=1)],
        image=[picture(), picture(1)],
        controlnet_conditioning_scale=[0.5, 0.7],
    )
    regions = [
        Region(picture(), adapter="edges", scale=0.5),
        Region(picture(1), adapter="other", scale=0.7),
    ]
    assert (draw(regions) - expected).abs().max() < LIMIT


@pytest.mark.parametrize(
    "region",
    [
        Region(picture(), torch.zeros(1, 1, *SIZE), "edges"),
        Region(picture(), left_half(), "edges", scale=0),
        Region(picture(), left_half(), "edges", start=0.5, end=0.5),
        Region(picture(), left_half(), "edges", levels=(0, 0, 0, 0)),
    ],
    ids=["mask", "scale", "never", "levels"],
)
@pytest.mark.filterwarnings("ignore:region 1 mask. all zero")
def test_of_nothing_is_the_uncontrolled_picture_to_the_bit(region):
    assert torch.equal(draw([region]), free())


def test_where_the_mask_is_0_its_residuals_are_0():
    """The first step's prediction: the up blocks spread what the mask lets in, the skips themselves have none."""
    net = pipe().controlnets["edges"]
    packed = pack([Region(picture(), left_half(), "edges", scale=2.0)], *SIZE)
    residuals = Residuals.build(packed, {"edges": net}, 1, device="cpu")
    found = [torch.ones(2, 1, 8, 10), torch.ones(2, 1, 4, 5), torch.ones(2, 1, 2, 3)]
    places = residuals.injections(0, {0: [found[0]] * 2 + [found[1]] * 2 + [found[2]] * 3})
    for level in places:
        gate = level.masks[0]
        width = gate.shape[-1]
        assert gate[..., : width // 2].eq(2).all() and gate[..., -(width // 2) :].eq(0).all()


def test_levels_are_those_of_the_blocks():
    """Each factor reaches the skips of its down block, the last the mid block."""
    packed = pack([Region(picture(), adapter="edges", levels=(1, 2, 3, 4), scale=10)], *SIZE)
    residuals = Residuals.build(packed, pipe().controlnets, 1, device="cpu")
    config = pipe().controlnets["edges"].config
    found = [torch.ones(1, 1, 2, 2)] * (len(config.skip_channels) + 1)
    gates = [float(level.masks[0][0, 0, 0, 0]) for level in residuals.injections(0, {0: found})]
    assert gates == [10, 10, 10, 20, 20, 30, 40]
    assert list(config.skip_levels) == [0, 0, 1, 1, 2, 2]


def test_they_run_in_the_steps_in_which_they_act_alone(monkeypatch):
    steps = []
    forward = ControlNet.forward

    def counted(net, sample, *given):
        steps.append(len(sample))
        return forward(net, sample, *given)

    monkeypatch.setattr(ControlNet, "forward", counted)
    draw([Region(picture(), left_half(), "edges", start=0.4)])
    assert steps == [2, 2, 2]
    steps.clear()
    regions = [Region(picture(), left_half(), "edges", end=0.4), Region(picture(), 1 - left_half(), "edges")]
    draw(regions)
    assert steps == [2] * 5  # the same net and condition: one run for both


def test_beside_adapters_words_and_another_net():
    everything = [
        Region(picture(), left_half(), "edges"),
        Region(picture(1), 1 - left_half(), "other", scale=0.5),
        Region(picture(), left_half(), "sketch"),
        Region(mask=left_half(), prompt="a blue square"),
    ]
    alone = [draw([region]) for region in everything]
    found = draw(everything)
    assert all((found - latents).abs().max() > 1e-3 for latents in (*alone, free()))
    assert torch.equal(draw(everything), found)


@pytest.mark.parametrize("adapter", ["edges", "sketch", "depth"])
def test_the_unguided_half_has_its_share(adapter):
    """One step's prediction: each half is that of a run in which both have its strength."""
    predictions = {}
    for scale, unguided in ((1, 1), (1, 0.25), (0.25, 1), (1, 0)):
        region = Region(picture(), left_half(), adapter, scale=scale, uncond_scale=unguided)
        predictions[scale, unguided] = first_prediction([region], images=2)
    free, whole = first_prediction([], images=2), predictions[1, 1]
    assert_close("guided", predictions[1, 0.25][2:], whole[2:], "unet")
    assert_close("unguided", predictions[1, 0.25][:2], predictions[0.25, 1][:2], "unet")
    assert_close("free", predictions[1, 0][:2], free[:2], "unet")
    assert (free - whole).abs().max() > 1e-3


def first_prediction(regions, images):
    """The UNet's output (2 images, 4, h, w) at the first step of two, unguided rows first."""
    found = []

    class Noted(Exception):
        pass

    def denoised(output, *given):
        found.append(output)
        raise Noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "runtime.sampling.loop.LinearStepper.advance", lambda _, latents, output, i: denoised(output)
        )
        with pytest.raises(Noted):
            draw(regions, steps=2, images_per_prompt=images)
    return found[0]


@pytest.mark.parametrize("options", [{"guidance": 1}, {"guidance_range": (0, 0)}])
def test_no_unguided_half_is_no_share_of_it(options):
    region = Region(picture(), left_half(), "edges", uncond_scale=0.5)
    with pytest.raises(
        InputError, match="region 1: uncond_scale 0.5: no step has guidance, and so an unguided half"
    ):
        draw([region], **options)


def test_a_compiled_unet_takes_the_share_of_either():
    """Of a ControlNet and of a T2I-Adapter."""
    sources = {"edges": make_controlnet(base().unet), "sketch": make_adapter()}
    plain = LocalControlPipeline.from_diffusers(base(), sources)
    compiled = LocalControlPipeline.from_diffusers(base(), sources).compile(compiler="eager")
    for name in sources:
        region = Region(picture(), left_half(), name, uncond_scale=0.5)
        found, expected = (
            p(PROMPT, [region], output_type="latent", **CALL).latents for p in (compiled, plain)
        )
        assert (found - expected).abs().max() < LIMIT


def test_keyframes_of_a_controlnet():
    ended = Region(picture(), left_half(), "edges", end=0.6)
    faded = Region(picture(), left_half(), "edges", scale="0:1,0.4:1,0.6:0")
    assert torch.equal(draw([faded]), draw([ended]))
    for region in (faded, ended):
        result = pipe()(PROMPT, [region], output_type="latent", **CALL)
        assert result.region_steps == [[0, 1, 2]]
    assert not torch.equal(draw([Region(picture(), left_half(), "edges", scale="0:1,0.8:0")]), draw([ended]))


def test_a_picture_does_not_depend_on_its_batch():
    regions = [Region(picture(), left_half(), "edges"), Region(picture(), adapter="depth", scale=0.4)]
    both = draw(regions, images_per_prompt=2)
    for i in range(2):
        assert_close("latents", both[i : i + 1], draw(regions, seed=3 + i), "unet")


@pytest.mark.parametrize("words", [False, True], ids=["plain", "words"])
def test_compiled_is_the_same(words):
    regions = [Region(picture(), left_half(), "edges", end=0.7), Region(picture(), left_half(), "sketch")]
    regions += [Region(mask=left_half(), prompt="a blue square")] if words else []
    compiled = LocalControlPipeline.from_diffusers(
        base(), {"edges": make_controlnet(base().unet), "sketch": make_adapter()}
    ).compile(compiler="eager")
    found = compiled(PROMPT, regions, output_type="latent", **CALL).latents
    assert (found - draw(regions)).abs().max() < LIMIT
    assert torch.equal(compiled(PROMPT, output_type="latent", **CALL).latents, found) is False


@pytest.mark.filterwarnings("error:edges condition")
def test_what_warms_up_compiles_the_graph_with_residuals_too():
    compiled = LocalControlPipeline.from_diffusers(base(), {"edges": make_controlnet(base().unet)})
    compiled.compile(compiler="eager")
    request = Request(PROMPT, [Region(picture(), adapter="edges")], height=64, width=64, guidance=1)
    compiled.warm_up(request=request)
    warm = {taken for taken, engine in compiled.denoiser.variants.items() if engine._compiled}
    assert warm == {Taken(), Taken(residuals=True)}


def test_steps_that_share_deep_features():
    regions = [Region(picture(), left_half(), "edges")]
    exact, cached = draw(regions), draw(regions, cache_interval=2)
    assert 0 < (cached - exact).abs().max() < (free() - exact).abs().max()


def test_the_outside_held():
    free_picture = pipe()(PROMPT, outside="held", output_type="pt", **CALL).images
    held = pipe()(PROMPT, [Region(picture(), left_half(), "edges")], outside="held", output_type="pt", **CALL)
    same = (held.images == free_picture).all(1)
    assert same[..., SIZE[1] // 2 :].all() and not same[..., : SIZE[1] // 2].all()


def test_an_unknown_name_lists_them_all():
    with pytest.raises(
        InputError, match="'pose' is unknown; expected one of: canny-2, depth, edges, other, sketch"
    ):
        draw([Region(picture(), adapter="pose")])


def test_one_that_does_not_fit_the_unet_is_refused():
    narrow = make_controlnet(base().unet, block_out_channels=(32, 64, 96), attention_head_dim=(2, 4, 4))
    with pytest.raises(
        InputError, match=r"^adapter 'edges': a ControlNet with skip_channels .* the UNet has"
    ):
        LocalControlPipeline.from_diffusers(base(), {"edges": narrow})
    text = make_controlnet(base().unet, cross_attention_dim=48)
    with pytest.raises(
        InputError, match="^adapter 'edges': a ControlNet with cross_attention_dim 48, the UNet has 32"
    ):
        LocalControlPipeline.from_diffusers(base(), {"edges": text})
