"""The pipeline on the tiny random SDXL: against diffusers' own, locality, work done once, bad input."""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLAdapterPipeline, T2IAdapter

from kernels import ops
from runtime import LocalControlPipeline, Region
from runtime.control.features import Control
from runtime.control.masks import box
from runtime.control.region import pack
from runtime.errors import InputError
from runtime.model.blocks import Attention
from runtime.sampling.schedulers import make_scheduler
from tests.support.tiny import CHANNELS, make_adapter, make_controlnet, make_pipeline
from tests.support.tolerances import relative_rms

PROMPT = "a red circle on sand"


@cache
def diffusers_pipe() -> StableDiffusionXLAdapterPipeline:
    parts = make_pipeline().components
    pipe = StableDiffusionXLAdapterPipeline(**parts, adapter=make_adapter())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def pipe() -> LocalControlPipeline:
    return LocalControlPipeline.from_diffusers(diffusers_pipe())


def condition(seed: int = 0) -> torch.Tensor:
    return (torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(seed)) > 0.8).float()


def noise(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def latents(*regions: Region, **options) -> torch.Tensor:
    return pipe()(PROMPT, regions, **{"steps": 4, "seed": 3} | options).latents


@pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("mask", [None, torch.ones(64, 64)], ids=["no mask", "mask of ones"])
def test_equals_diffusers_adapter_pipeline(mask, guidance):
    theirs = diffusers_pipe()(
        PROMPT,
        image=condition(),
        latents=noise(),
        num_inference_steps=6,
        guidance_scale=guidance,
        adapter_conditioning_scale=0.7,
        height=64,
        width=64,
        output_type="latent",
    ).images
    region = Region(condition(), mask=mask, scale=0.7)
    ours = latents(region, latents=noise(), steps=6, guidance=guidance, scheduler="euler")
    assert relative_rms(ours, theirs) < 1e-5
    assert (
        relative_rms(latents(latents=noise(), steps=6, guidance=guidance), theirs) > 1e-3
    )  # the control counts


def test_equals_diffusers_with_a_negative_prompt_and_a_size():
    options = {"negative_prompt": "a blue star", "height": 48, "width": 80}
    picture = torch.rand(1, 1, 48, 80)
    start = torch.randn(1, 4, 6, 10)
    theirs = diffusers_pipe()(
        PROMPT,
        image=picture,
        latents=start,
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="latent",
        **options,
    ).images
    ours = pipe()(PROMPT, [Region(picture)], latents=start, steps=4, **options).latents
    assert relative_rms(ours, theirs) < 1e-5


@pytest.mark.parametrize("rescale", [0.7, 1.0])
@pytest.mark.parametrize("scheduler", ["euler", "unipc"], ids=["linear steps", "the scheduler's steps"])
def test_guidance_is_rescaled_as_in_diffusers(monkeypatch, scheduler, rescale):
    monkeypatch.setattr(diffusers_pipe(), "scheduler", make_scheduler(scheduler, diffusers_pipe().scheduler))
    theirs = diffusers_pipe()(
        PROMPT,
        image=condition(),
        latents=noise(),
        num_inference_steps=4,
        guidance_scale=9.0,
        guidance_rescale=rescale,
        output_type="latent",
    ).images
    options = {"latents": noise(), "guidance": 9.0, "scheduler": scheduler}
    assert relative_rms(latents(Region(condition()), **options, guidance_rescale=rescale), theirs) < 1e-5
    assert relative_rms(latents(Region(condition()), **options), theirs) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": torch.zeros(64, 64)},
        {"scale": 0.0},
        {"levels": (0, 0, 0, 0)},
        {"start": 0.5, "end": 0.5},
    ],
    ids=["mask of zeros", "scale 0", "levels 0", "never active"],
)
@pytest.mark.filterwarnings("ignore:.*all zero")
def test_a_control_that_is_off_changes_no_bit(changes):
    assert torch.equal(latents(Region(condition(), **changes)), latents())


def test_mask_condition_hides_what_is_outside_the_mask():
    mask = box(64, 64, (0, 0, 32, 64))
    other = torch.where(mask > 0, condition(0), condition(1))
    assert not torch.equal(other, condition(0))
    regions = [Region(c, mask=mask, mask_condition=True) for c in (condition(0), other)]
    assert torch.equal(latents(regions[0]), latents(regions[1]))
    # without it, the adapter's receptive field carries some of it across the edge
    assert not torch.equal(latents(Region(condition(0), mask=mask)), latents(Region(other, mask=mask)))


def test_gated_features_are_zero_where_the_mask_is():
    mask = box(64, 64, (0, 0, 32, 64))
    packed = pack([Region(condition(), mask=mask)], 64, 64)
    control = Control.build(
        packed,
        pipe().adapters,
        4,
        device="cpu",
        dtype=torch.float32,
        channels=pipe().denoiser.control_channels,
    )
    for level in control.gated(0):
        half = level.shape[-1] // 2
        assert not level[..., half:].any()
        assert level[..., :half].any()


def test_disjoint_regions_and_split_masks_add_up():
    left, right = box(64, 64, (0, 0, 32, 64)), box(64, 64, (32, 0, 64, 64))
    whole = latents(Region(condition(), scale=0.5))
    halves = latents(Region(condition(), mask=left, scale=0.5), Region(condition(), mask=right, scale=0.5))
    twice = latents(Region(condition(), scale=0.25), Region(condition(), scale=0.25))
    assert relative_rms(halves, whole) < 1e-5
    assert relative_rms(twice, whole) < 1e-5


def test_start_and_end_split_the_steps():
    early, late = (latents(Region(condition(), start=a, end=b)) for a, b in ((0, 0.5), (0.5, 1)))
    both = latents(Region(condition(), start=0, end=0.5), Region(condition(), start=0.5, end=1))
    assert relative_rms(both, latents(Region(condition()))) < 1e-6
    assert not torch.equal(early, late)
    assert not torch.equal(early, latents())


@pytest.mark.parametrize(
    "scheduler", ["euler", "euler_a", "dpm++2m", "ddim", "lcm", "heun", "UniPCMultistepScheduler"]
)
def test_an_image_does_not_depend_on_its_batch(scheduler):
    options = {"scheduler": scheduler, "steps": 5}
    batch = latents(Region(condition()), images_per_prompt=3, **options)
    alone = latents(Region(condition()), **options | {"seed": 5})
    assert relative_rms(batch[2:], alone) < 1e-5
    assert torch.equal(
        latents(Region(condition()), **options | {"seed": 5}), alone
    )  # and is the same every time


def test_several_prompts_make_a_batch():
    prompts = ["a red circle", "a blue star at night"]
    batch = pipe()(prompts, steps=4, seed=3, images_per_prompt=2)
    assert len(batch.images) == 4
    alone = pipe()(prompts[1], steps=4, seed=6)
    assert relative_rms(batch.latents[3:], alone.latents) < 1e-5


@pytest.mark.parametrize("negative", ["", "grey", "grey stones " * 60], ids=["none", "short", "long"])
def test_prompts_of_any_length_make_a_batch(negative):
    prompts = ["a red circle", "a blue star " * 40, "night " * 200]
    batch = pipe()(prompts, steps=3, seed=3, negative_prompt=negative, output_type="latent")
    for i, prompt in enumerate(prompts):
        alone = pipe()(prompt, steps=3, seed=3 + i, negative_prompt=negative, output_type="latent")
        assert relative_rms(batch.latents[i : i + 1], alone.latents) < 1e-5


def test_the_adapter_and_the_text_projections_run_once(monkeypatch):
    calls = {"adapter": 0, "projections": 0, "unet": 0}

    def count(owner, method, key, when=lambda *args: True):
        original = getattr(owner, method)

        def counted(self, *args, **kwargs):
            calls[key] += bool(when(self))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    cross = {id(m.attn2) for m in pipe().model.unet.modules() if hasattr(m, "attn2")}
    count(T2IAdapter, "forward", "adapter")
    count(Attention, "project", "projections", lambda m: id(m) in cross)
    count(type(pipe().model.unet), "forward", "unet")
    latents(Region(condition()), steps=5, images_per_prompt=2)
    assert calls == {"adapter": 1, "projections": len(cross), "unet": 5}


def test_result_reports_images_timings_and_seed():
    result = pipe()(PROMPT, [Region(condition())], steps=2, height=48, width=80, seed=11)
    assert result.images[0].size == (80, 48)
    assert result.seed == 11
    assert set(result.timings) == {"text", "adapter", "denoise", "decode", "total"}
    assert sum(result.timings.values()) - result.timings["total"] <= result.timings["total"]
    drawn = pipe()(PROMPT, steps=2)
    assert torch.equal(pipe()(PROMPT, steps=2, seed=drawn.seed).latents, drawn.latents)


def test_decodes_as_diffusers_does():
    result = pipe()(PROMPT, steps=2, seed=0)
    vae = pipe().model.vae
    with torch.no_grad():
        expected = vae.decode(result.latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    expected = ((expected[0].permute(1, 2, 0) + 1) * 127.5).round()
    made = torch.from_numpy(np.array(result.images[0])).float()
    assert (made - expected).abs().max() <= 1


def test_decoded_pixels_have_no_gradient():
    assert any(p.requires_grad for p in pipe().model.vae.parameters())
    assert pipe().decode(noise()).numpy().shape == (1, 3, 64, 64)


def test_any_of_a_calls_arguments_warms_up(monkeypatch):
    drawn = []
    monkeypatch.setattr(LocalControlPipeline, "draw", lambda self, request: drawn.append(request))
    pipe().warm_up(
        images_per_prompt=2, prompt=["a star", "a cat AND a dog"], prompt_syntax="a1111", height=32
    )
    pipe().warm_up(48, 64, 3)
    assert [(r.images, r.rows(True), r.height, r.width) for r in drawn] == [(4, 10, 32, 64), (3, 6, 48, 64)]


def test_guidance_on_no_step_is_the_prompt_alone():
    options = {"steps": 2, "seed": 0, "images_per_prompt": 2}
    none = pipe()(PROMPT, [Region(condition())], guidance=7.0, guidance_range=(0.9, 1.0), **options)
    alone = pipe()(PROMPT, [Region(condition())], guidance=1.0, **options)
    assert relative_rms(none.latents, alone.latents) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 65}, "height 65: .* 64 and 80"),
        ({"width": 0}, "width 0"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 2.5}, r"steps 2\.5"),
        ({"steps": 1001}, "steps 1001: expected a whole number from 1 to 1000"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance_range": (0.5, 0.2)}, r"guidance_range 0\.5 to 0\.2: expected 0 <= start"),
        ({"guidance_range": (0.5, 2)}, "guidance_range 0.5 to 2"),
        ({"guidance_range": None}, "guidance_range None: expected two fractions"),
        ({"guidance_range": (0, 0.5, 1)}, "expected two fractions"),
        ({"guidance_range": "all"}, "guidance_range 'all': expected two fractions"),
        ({"seed": -1}, "seed -1"),
        ({"images_per_prompt": 0}, "images_per_prompt 0"),
        ({"scheduler": "eulr"}, r"scheduler 'eulr' is unknown.*euler, "),
        ({"scheduler": "UNet2DConditionModel"}, "is unknown"),
        ({"scheduler": "lcm", "steps": 60}, r"steps 60: LCMScheduler refuses it"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents: shape \(1, 4, 4, 4\), expected \(1, 4, 8, 8\)"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "latents: NaN"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt .*expected a text"),
        ({"regions": [Region(condition(), adapter="depth")]}, r"adapter 'depth' is unknown.*canny"),
        ({"regions": [condition()]}, "region 1: a Tensor; expected a runtime.Region"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input(options, message):
    arguments = {"prompt": PROMPT, "steps": 2, "seed": 0} | options
    if message is None:  # an empty prompt is a prompt
        assert pipe()(**arguments).images
        return
    with pytest.raises(InputError, match=message) as caught:
        pipe()(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "device", "message"), [("fp8", None, "dtype 'fp8'"), (None, "gpu", "device 'gpu'")]
)
def test_from_pretrained_refuses_unknown_settings(dtype, device, message):
    with pytest.raises(InputError, match=message):
        LocalControlPipeline.from_pretrained(dtype=dtype, device=device)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        LocalControlPipeline.from_diffusers(diffusers_pipe(), backend="cuda")


@pytest.mark.parametrize("stage", ["text", "adapter", "denoise", "decode"])
def test_nan_names_the_stage(stage):
    broken = make_pipeline()
    adapter = make_adapter()
    part = {
        "text": broken.text_encoder.get_input_embeddings().weight,
        "adapter": adapter.adapter.conv_in.weight,
        "denoise": broken.unet.conv_out.weight,
        "decode": broken.vae.decoder.conv_out.weight,
    }[stage]
    with torch.no_grad():
        part[:] = float("nan")
    local = LocalControlPipeline.from_diffusers(broken, {"canny": adapter})
    with pytest.raises(InputError, match=f"^{stage}: the result has NaN"):
        local(PROMPT, [Region(condition())], steps=2, seed=0)


def test_an_adapter_of_other_channels_is_refused():
    local = LocalControlPipeline.from_diffusers(make_pipeline(), {"canny": make_adapter((16, 32, 32, 32))})
    with pytest.raises(InputError, match=r"\(16, 32, 32, 32\).*" + str(CHANNELS[0])):
        local(PROMPT, [Region(condition())], steps=2, seed=0)


def test_bf16_is_close_to_fp32():
    local = LocalControlPipeline.from_diffusers(make_pipeline().to(torch.bfloat16), {"canny": make_adapter()})
    options = {"steps": 4, "seed": 3}
    half = local(PROMPT, [Region(condition())], **options).latents
    assert relative_rms(half, latents(Region(condition()))) < 2e-2


LONG = "a red circle and a blue star at night, " * 20


def test_a_generator_draws_as_diffusers_do():
    def theirs(generator, count):
        return diffusers_pipe()(
            PROMPT,
            image=condition(),
            num_inference_steps=4,
            generator=generator,
            num_images_per_prompt=count,
            output_type="latent",
        ).images

    def ours(generator, count):
        return latents(Region(condition()), seed=None, generator=generator, images_per_prompt=count)

    def make(seed):
        return torch.Generator().manual_seed(seed)

    assert relative_rms(ours(make(5), 2), theirs(make(5), 2)) < 1e-5
    lists = [[make(5), make(6)] for _ in range(2)]
    assert relative_rms(ours(lists[0], 2), theirs(lists[1], 2)) < 1e-5
    result = pipe()(PROMPT, steps=1, generator=make(5))
    assert result.seed == 5


def test_each_prompt_may_have_its_negative_prompt():
    start, texts, negatives = noise(2), ["a red circle", "a blue star"], ["at night", ""]
    both = pipe()(texts, negative_prompt=negatives, latents=start, steps=4).latents
    for i in range(2):
        one = pipe()(texts[i], negative_prompt=negatives[i], latents=start[i : i + 1], steps=4).latents
        assert relative_rms(both[i : i + 1], one) < 1e-5


def test_pictures_come_in_the_types_of_diffusers():
    results = {
        kind: pipe()(PROMPT, steps=2, seed=1, output_type=kind) for kind in ("pil", "np", "pt", "latent")
    }
    pixels = results["pt"].images
    assert pixels.shape == (1, 3, 64, 64) and pixels.dtype == torch.float32
    assert np.array_equal(results["np"].images[0], pixels[0].permute(1, 2, 0).numpy())
    assert np.array_equal(
        np.asarray(results["pil"].images[0]), (pixels[0] * 255).round().byte().movedim(0, 2).numpy()
    )
    assert len(results["latent"].images) == 0 and "decode" not in results["latent"].timings
    assert all(torch.equal(r.latents, results["pil"].latents) for r in results.values())


def test_a_long_prompt_counts_to_its_end():
    ends = [pipe()(LONG + end, steps=2, seed=1).latents for end in ("a green ring", "a purple square")]
    assert relative_rms(*ends) > 1e-4


def test_a_compiled_unet_takes_prompts_of_any_length():
    own = LocalControlPipeline.from_diffusers(make_pipeline()).compile(compiler="eager")
    for prompt in (PROMPT, LONG, PROMPT):
        expected = pipe()(prompt, steps=2, seed=1).latents
        assert relative_rms(own(prompt, steps=2, seed=1).latents, expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loras": 5}, "loras '5': expected a list of files"),
        ({"loras": [("x",)]}, r"LoRA \('x',\): expected a file, or \(file, weight\)"),
        ({"loras": [(5, 1.0)]}, r"LoRA \(5, 1.0\): expected a file, or \(file, weight\)"),
        ({"loras": [("x", "strong")]}, "LoRA x: weight 'strong': expected a finite number"),
        ({"vae": 5}, r"vae 5: expected a folder, a \.safetensors file or a hub id"),
        ({"adapters": 5}, "adapters 5: expected names and their files"),
    ],
    ids=str,
)
def test_from_pretrained_refuses_what_names_no_file(options, message):
    with pytest.raises(InputError, match=message):
        LocalControlPipeline.from_pretrained(**options)


@pytest.mark.parametrize("make", [make_adapter, lambda: make_controlnet(diffusers_pipe().unet)])
def test_torch_compiles_cover_is_taken_off_an_adapter(make):
    control = make()
    drawn = [
        LocalControlPipeline.from_diffusers(diffusers_pipe(), {"canny": source})(
            PROMPT, [Region(condition())], steps=1, seed=1, output_type="latent"
        ).latents
        for source in (control, torch.compile(control, backend="eager"))
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("make", [make_adapter, lambda: make_controlnet(diffusers_pipe().unet)])
def test_pipelines_of_other_dtypes_share_an_adapter(make):
    """The second one's dtype changed the first one's adapter, and its next picture failed."""
    control = make()
    first = LocalControlPipeline.from_diffusers(make_pipeline(), {"canny": control})
    options = {"regions": [Region(condition())], "steps": 1, "seed": 1, "output_type": "latent"}
    before = first(PROMPT, **options).latents
    second = LocalControlPipeline.from_diffusers(make_pipeline().to(torch.bfloat16), {"canny": control})
    assert relative_rms(second(PROMPT, **options).latents, before) < 0.1
    assert torch.equal(first(PROMPT, **options).latents, before)


def test_an_adapters_weights_are_shared_and_its_mode_is_its_own():
    adapter = make_adapter().train()
    taken = LocalControlPipeline.from_diffusers(diffusers_pipe(), {"canny": adapter}).adapters["canny"]
    assert adapter.training and not taken.training
    pairs = zip(adapter.parameters(), taken.parameters(), strict=True)
    assert all(theirs.data_ptr() == ours.data_ptr() for theirs, ours in pairs)


def test_a_backend_that_the_device_has_not_is_refused_before_loading(monkeypatch):
    """On a machine with a GPU, too."""
    monkeypatch.setattr(ops, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        InputError, match="backend 'triton' needs .* the device is cpu; use 'auto' or 'torch'"
    ):
        LocalControlPipeline.from_pretrained("no such model", device="cpu", backend="triton")
