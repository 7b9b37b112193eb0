"""Starting from a picture: as diffusers' img2img pipeline does, with every scheduler; and on engines."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLImg2ImgPipeline
from PIL import Image

from runtime import LocalControlPipeline, Region, generate
from runtime.capabilities import of_manifest
from runtime.engines.manifest import read_manifest
from runtime.errors import InputError
from runtime.sampling.request import Request
from runtime.sampling.schedulers import SCHEDULERS, make_scheduler
from tests.runtime.test_pipeline import PROMPT, condition, pipe
from tests.support import engines, saved_model
from tests.support.tiny import make_pipeline
from tests.support.tolerances import relative_rms

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@cache
def img2img() -> StableDiffusionXLImg2ImgPipeline:
    made = StableDiffusionXLImg2ImgPipeline(**make_pipeline().components)
    made.set_progress_bar_config(disable=True)
    return made


def theirs(monkeypatch, scheduler, generator, **options):
    monkeypatch.setattr(img2img(), "scheduler", make_scheduler(scheduler, img2img().scheduler))
    return img2img()(
        PROMPT, image=PICTURE, generator=generator, output_type="latent", guidance_scale=5.0, **options
    ).images


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "PNDMScheduler"])
def test_equals_diffusers_with_every_scheduler(monkeypatch, scheduler, strength):
    expected = theirs(
        monkeypatch, scheduler, torch.Generator().manual_seed(3), num_inference_steps=8, strength=strength
    )
    ours = pipe()(
        PROMPT,
        image=PICTURE,
        strength=strength,
        steps=8,
        scheduler=scheduler,
        generator=torch.Generator().manual_seed(3),
    )
    assert relative_rms(ours.latents, expected) < 1e-5
    assert ours.images[0].size == (64, 64) and "encode" in ours.timings


def test_several_images_draw_from_their_own_generators(monkeypatch):
    made = [[torch.Generator().manual_seed(s) for s in (3, 4)] for _ in range(2)]
    options = {"strength": 0.5, "num_inference_steps": 6, "num_images_per_prompt": 2}
    expected = theirs(monkeypatch, "euler", made[0], **options)
    ours = pipe()(
        PROMPT, image=PICTURE, strength=0.5, steps=6, seed=3, images_per_prompt=2, scheduler="euler"
    ).latents
    assert relative_rms(ours, expected) < 1e-5


def test_control_is_added_and_a_mask_of_ones_changes_nothing():
    options = {"image": PICTURE, "strength": 0.6, "steps": 6, "seed": 3}
    free, whole, masked, empty = (
        pipe()(PROMPT, regions, **options).latents
        for regions in (
            [],
            [Region(condition())],
            [Region(condition(), mask=torch.ones(64, 64))],
            [Region(condition(), mask=torch.zeros(64, 64))],
        )
    )
    assert (
        relative_rms(whole, free) > 1e-3 and relative_rms(masked, whole) < 1e-6 and torch.equal(empty, free)
    )


def test_a_tiny_vae_encodes_as_diffusers_has_it():
    """AutoencoderTiny (TAESD) draws nothing: it has no posterior."""
    blocks = {f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decoder")}
    blocks |= {f"num_{half}_blocks": (1,) * 4 for half in ("encoder", "decoder")}
    theirs = StableDiffusionXLImg2ImgPipeline(
        **make_pipeline().components | {"vae": AutoencoderTiny(**blocks).eval()}
    )
    theirs.set_progress_bar_config(disable=True)
    made = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = theirs(
        PROMPT,
        image=PICTURE,
        generator=made[0],
        strength=0.5,
        num_inference_steps=6,
        output_type="latent",
        guidance_scale=5.0,
    ).images
    ours = LocalControlPipeline.from_diffusers(theirs)
    assert (
        relative_rms(ours(PROMPT, image=PICTURE, strength=0.5, steps=6, generator=made[1]).latents, expected)
        < 1e-5
    )
    assert len(ours(PROMPT, image=PICTURE, steps=1, images_per_prompt=2, seed=1).images) == 2


OTHER = PICTURE.rotate(90)


@pytest.mark.parametrize("outside", ["free", "held"])
def test_each_picture_may_start_from_its_own(outside):
    """Two prompts of two pictures each: a list of two is the prompts', one of four the pictures'."""
    half = torch.zeros(64, 64)
    half[:, :32] = 1
    regions = [Region(condition(), half)]
    options = {"steps": 4, "strength": 0.5, "outside": outside, "output_type": "pt"}
    starts = {2: [PICTURE, OTHER], 4: [PICTURE, OTHER, OTHER.convert("L"), PICTURE]}
    for count, images in starts.items():
        found = pipe()(["a", "b"], regions, image=images, seed=3, images_per_prompt=2, **options)
        for i in range(4):
            own = pipe()("ab"[i // 2], regions, image=images[i * count // 4], seed=3 + i, **options)
            assert relative_rms(found.latents[i : i + 1], own.latents) < 1e-5
            assert relative_rms(found.images[i], own.images[0]) < 1e-5
            if outside == "held":
                assert torch.equal(found.images[i][..., 32:], own.images[0][..., 32:])


def test_lists_of_starts_are_as_diffusers(monkeypatch):
    made = [[torch.Generator().manual_seed(s) for s in (3, 4)] for _ in range(2)]
    monkeypatch.setattr(img2img(), "scheduler", make_scheduler("euler", img2img().scheduler))
    images, prompts = [PICTURE, OTHER], ["a", "b"]
    expected = img2img()(
        prompts, image=images, generator=made[0], strength=0.5, num_inference_steps=6, output_type="latent"
    ).images
    options = {"guidance": 5.0, "scheduler": "euler", "output_type": "latent"}
    ours = pipe()(prompts, image=images, generator=made[1], strength=0.5, steps=6, **options).latents
    assert relative_rms(ours, expected) < 1e-5


def test_a_list_of_starts_keeps_each_ones_colours(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    PICTURE.save(tmp_path / "a.png", icc_profile=profile)
    half = torch.zeros(64, 64)
    half[:, :32] = 1
    images = [tmp_path / "a.png", OTHER]
    result = pipe()(
        "a", [Region(condition(), half)], image=images, images_per_prompt=2, steps=1, outside="held"
    )
    assert [image.info.get("icc_profile") for image in result.images] == [profile, None]


def test_less_strength_keeps_more_of_the_picture():
    start = pipe()(PROMPT, image=PICTURE, strength=0.13, steps=8, seed=1, guidance=1).latents
    far = pipe()(PROMPT, image=PICTURE, strength=1.0, steps=8, seed=1, guidance=1).latents
    with torch.no_grad():
        own = make_pipeline().vae.encode(
            torch.from_numpy(np.asarray(PICTURE) / 127.5 - 1).float().movedim(2, 0)[None]
        )
    own = own.latent_dist.mean * make_pipeline().vae.config.scaling_factor
    assert (start - own).norm() < (far - own).norm()


@pytest.mark.parametrize(("size", "drawn"), [((70, 49), (64, 48)), ((10, 16), (16, 16))])
def test_the_pictures_own_size_counts_where_none_is_asked_for(size, drawn):
    assert pipe()(PROMPT, image=PICTURE.resize(size), steps=2, seed=1).images[0].size == drawn


def test_another_size_of_the_same_aspect_ratio_may_be_asked_for():
    asked = pipe()(PROMPT, image=PICTURE.resize((70, 49)), steps=2, seed=1, height=32, width=48)
    assert asked.images[0].size == (48, 32)


@pytest.mark.parametrize("outside", ["free", "held"])
@pytest.mark.parametrize(("width", "height"), [(2000, 783), (783, 2000), (1023, 127), (127, 1023)])
def test_the_size_that_a_picture_has_by_itself_may_be_asked_for(width, height, outside):
    image = torch.zeros(1, 1, height, width)
    rows, columns = Request("x", image=image, outside=outside).size(64)
    for asked in ({"height": rows, "width": columns}, {"height": rows}, {"width": columns}):
        sides = Request("x", image=image, outside=outside, **asked).size(64)
        assert Request("x", image=image, height=sides[0], width=sides[1]).size(64) == sides


def test_regions_act_in_fractions_of_the_steps_that_are_run():
    result = pipe()(PROMPT, [Region(condition(), end=0.5)], image=PICTURE, strength=0.5, steps=8, seed=1)
    assert result.region_steps == [[0, 1]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"strength": 0.5}, "strength 0.5 without an image to start from; expected 1"),
        ({"image": PICTURE, "strength": 0}, "strength 0: expected a number above 0, up to 1"),
        ({"image": PICTURE, "strength": 1.5}, "strength 1.5: expected a number above 0, up to 1"),
        ({"image": PICTURE, "strength": "x"}, "strength 'x': expected a finite number"),
        (
            {"image": PICTURE, "strength": 0.01, "steps": 30},
            "none of 30 steps is left; expected at least 0.03334",
        ),
        (
            {"image": PICTURE, "height": 64, "width": 96},
            "image: 64 x 64 px, and the picture is 96 x 64, of another aspect ratio; crop it, or leave height",
        ),
        ({"image": "nowhere.png"}, "image: nowhere.png does not exist"),
        ({"image": [[PICTURE]]}, "image: a list is not an image"),
        ({"image": [PICTURE] * 2}, "image: a list of 2; expected one"),
        (
            {"image": [PICTURE, PICTURE.resize((80, 64))], "images_per_prompt": 2},
            "image 2: 80 x 64 px beside 64 x 64; expected pictures of one size",
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused(given, said):
    with pytest.raises(InputError) as caught:
        Request("x", **given)
    assert said in str(caught.value)


@pytest.mark.parametrize("steps", [*range(2, 60), 77, 333, 999, 1000])
def test_the_least_strength_that_is_named_is_enough(steps):
    with pytest.raises(InputError) as caught:
        Request("x", image=PICTURE, strength=1e-9, steps=steps)
    named = float(str(caught.value).rpartition(" ")[2])
    assert Request("x", image=PICTURE, strength=named, steps=steps).run_steps == 1


def test_an_engine_encodes_where_it_has_the_encoder():
    options = {"image": PICTURE, "strength": 0.5, "steps": 4, "seed": 3}
    ours = LocalControlPipeline.from_engine(engines.folder("onnxruntime"))(PROMPT, **options)
    expected = LocalControlPipeline.from_pretrained(saved_model.folder(), dtype="fp32")(PROMPT, **options)
    assert relative_rms(ours.latents, expected.latents) < 1e-4


def test_an_engine_without_the_encoder_says_so_before_anything_is_loaded():
    manifest = read_manifest(engines.folder("onnxruntime"))
    without = {name: spec for name, spec in manifest.engines.items() if name != "vae_encoder"}
    able = of_manifest(dataclasses.replace(manifest, engines=without))
    with pytest.raises(InputError, match="image: the engines have no vae_encoder; rebuild them with it"):
        able.check(Request(PROMPT, image=PICTURE))
    of_manifest(manifest).check(Request(PROMPT, image=PICTURE))


def test_the_command_line_starts_from_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("photo.png")
    common = ["--prompt", PROMPT, "--steps", "4", "--seed", "3", "--model", str(saved_model.folder())]
    assert generate.main([*common, "--image", "photo.png", "--strength", "0.5"]) == 0
    drawn = pipe_of_files()(PROMPT, image=PICTURE, strength=0.5, steps=4, seed=3).images[0]
    found = Image.open("out.png")
    assert np.array_equal(np.asarray(found), np.asarray(drawn))
    assert (found.text["image"], found.text["strength"]) == ("photo.png", "0.5")
    assert generate.main([*common, "--image", "photo.png", "--out", "photo.png"]) == 2
    assert "--image: photo.png would be overwritten by --out" in capsys.readouterr().err


def pipe_of_files():
    return LocalControlPipeline.from_pretrained(saved_model.folder(), dtype="fp32")
