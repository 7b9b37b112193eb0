"""A pipeline on engines gives the pictures of the same pipeline in torch, with nothing rebuilt when a call changes."""

import gc
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import export.build
import export.onnx_export
import export.targets.compile
from runtime import LocalControlPipeline, Region
from runtime.control.masks import box
from runtime.engines.denoiser import EngineDenoiser
from runtime.engines.manifest import read_manifest
from runtime.engines.parts import EngineTextEncoder, EngineVAE, load_engines
from runtime.errors import InputError
from runtime.loading.folder import load_folder
from tests.runtime.loading.test_lora import LAYERS, write_lora
from tests.support import engines, saved_model
from tests.support.saved_model import edit_json, edit_tensors
from tests.support.tiny import make_adapter

PROMPT = "a red circle on sand"
UNET_ONLY = ("unet",)
MOST = ("text_encoder", "adapter", "unet")


@pytest.fixture(autouse=True)
def _nothing_is_built(monkeypatch):
    """Once the folders are there, no test here may export or compile."""
    for target in engines.TARGETS:
        engines.folder(target)
    engines.folder("onnxruntime", UNET_ONLY)
    engines.folder("onnxruntime", MOST)

    def refuse(*arguments, **options):
        raise AssertionError("a graph was built at run time")

    for module in (export.onnx_export, export.build):
        monkeypatch.setattr(module, "export_onnx", refuse)
    for module in (export.targets.compile, export.build):
        monkeypatch.setattr(module, "compile_engine", refuse)


@cache
def torch_pipe() -> LocalControlPipeline:
    return LocalControlPipeline.from_pretrained(
        saved_model.folder(), {"canny": engines.adapter()}, device="cpu"
    )


@cache
def engine_pipe(target: str, components=engines.COMPONENTS) -> LocalControlPipeline:
    return LocalControlPipeline.from_engine(engines.folder(target, components))


def condition(seed: int = 0, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return (torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed)) > 0.8).float()


LEFT, RIGHT = box(64, 64, (0, 0, 32, 64)), box(64, 64, (16, 0, 64, 64))
CALLS = {
    "no region": {},
    "one region": {"regions": [Region(condition())]},
    "mask": {"regions": [Region(condition(), mask=LEFT)]},
    "strength": {"regions": [Region(condition(), mask=LEFT, scale=0.4)]},
    "levels": {"regions": [Region(condition(), mask=LEFT, levels=(1, 0.5, 0, 2))]},
    "start and end": {"regions": [Region(condition(), start=0.25, end=0.75)]},
    "two regions": {
        "regions": [
            Region(condition(), mask=LEFT, scale=0.8, end=0.5),
            Region(condition(1), mask=RIGHT, scale=1.2, start=0.25),
        ]
    },
    "mask_condition": {"regions": [Region(condition(), mask=LEFT, mask_condition=True)]},
    "mask of zeros": {"regions": [Region(condition(), mask=torch.zeros(64, 64))]},
    "no guidance": {"regions": [Region(condition(), mask=LEFT)], "guidance": 1.0},
    "more guidance": {"regions": [Region(condition(), mask=LEFT)], "guidance": 9.0},
    "guidance at first": {"regions": [Region(condition(), mask=LEFT)], "guidance_range": (0.0, 0.5)},
    "guidance amid": {"regions": [Region(condition(), mask=LEFT)] * 2, "guidance_range": (0.25, 0.75)},
    "negative prompt": {"negative_prompt": "a blue star"},
    "other size": {"regions": [Region(condition(2, (32, 96)))], "height": 32, "width": 96},
    "size between": {"regions": [Region(condition(2, (80, 48)))], "height": 80, "width": 48},
    "two images": {"regions": [Region(condition(), mask=LEFT)], "images_per_prompt": 2},
    "two prompts": {"prompt": ["a red circle", "a blue star at night"], "steps": 2},
    "more texts than the encoders take at once": {
        "prompt": ["a red circle", "a blue star at night"],
        "negative_prompt": "a green ring",
        "steps": 2,
    },
    "euler_a": {"regions": [Region(condition())], "scheduler": "euler_a"},
    "dpm++2m": {"regions": [Region(condition())], "scheduler": "dpm++2m"},
    "heun": {"regions": [Region(condition(), end=0.5)], "scheduler": "heun"},
    "ddim": {"regions": [Region(condition())], "scheduler": "ddim"},
    "one step": {"regions": [Region(condition())], "steps": 1},
}


def call(pipe: LocalControlPipeline, **options):
    return pipe(**{"prompt": PROMPT, "steps": 4, "seed": 3} | options)


@cache
def expected(case: str):
    return call(torch_pipe(), **CALLS[case])


def assert_same_picture(made, wanted):
    """Latents within 1e-3, pictures within a grey level on average."""
    assert made.latents.shape == wanted.latents.shape
    assert (made.latents - wanted.latents).abs().max() < 1e-3
    for left, right in zip(made.images, wanted.images, strict=True):
        left, right = (np.asarray(image, dtype=float) for image in (left, right))
        assert left.shape == right.shape
        assert np.abs(left - right).mean() < 1


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("target", engines.TARGETS)
@pytest.mark.filterwarnings("ignore:.*all zero")
def test_equals_torch(target, case):
    assert_same_picture(call(engine_pipe(target), **CALLS[case]), expected(case))


@pytest.mark.parametrize(
    "cases",
    [
        ["no region", "one region", "mask", "strength", "levels", "start and end", "two regions"],
        ["mask", "strength", "mask_condition", "no guidance", "more guidance", "guidance at first"],
        ["one region", "euler_a", "dpm++2m", "ddim"],
    ],
    ids=["control", "call", "scheduler"],
)
def test_the_cases_differ(cases):
    """What they equal above is another picture each time, so that none of the options can have been ignored."""
    for i, case in enumerate(cases):
        for other in cases[:i]:
            left, right = expected(case).latents, expected(other).latents
            assert not torch.allclose(left, right, atol=1e-2), f"{case} and {other}"


@pytest.mark.parametrize("target", engines.TARGETS)
def test_one_call_leaves_nothing_for_the_next(target):
    """To the bit: what a region, a size or a batch left in the engines' memory is not seen again."""
    pipe = engine_pipe(target)
    first = call(pipe, **CALLS["no region"]).latents
    for case in ("two regions", "two images", "other size", "no guidance", "guidance amid"):
        call(pipe, **CALLS[case])
        assert torch.equal(call(pipe, **CALLS["no region"]).latents, first), case


@pytest.mark.filterwarnings("ignore:.*all zero")
@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_mask_of_zeros_is_no_control_to_the_bit(target):
    masked, free = (call(engine_pipe(target), **CALLS[case]) for case in ("mask of zeros", "no region"))
    assert torch.equal(masked.latents, free.latents)


def test_everything_runs_on_engines():
    model, denoiser, adapters = load_engines(engines.folder("openvino"), torch.device("cpu"))
    assert isinstance(denoiser, EngineDenoiser)
    assert all(isinstance(encoder, EngineTextEncoder) for encoder in model.text_encoders)
    assert isinstance(model.vae, EngineVAE)
    assert model.unet is None
    assert list(adapters) == ["canny"]
    assert adapters["canny"].config.channels == list(torch_pipe().denoiser.control_channels)
    assert denoiser.latent_channels == torch_pipe().denoiser.latent_channels
    assert denoiser.control_channels == torch_pipe().denoiser.control_channels


def test_the_model_is_not_needed(tmp_path, monkeypatch):
    """Where all was compiled, the folder is enough."""

    def refuse(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("runtime.engines.parts.load_model", refuse)
    moved = engines.copy_folder("onnxruntime", tmp_path)
    edit_json(moved / "manifest.json", adapters={"canny": "gone"})
    pipe = LocalControlPipeline.from_engine(moved)
    assert pipe.default_size == 64
    assert torch.equal(call(pipe, steps=1).latents, call(engine_pipe("onnxruntime"), steps=1).latents)


@pytest.mark.parametrize("kind", ["another name", "the same name", "a folder"])
def test_a_torch_adapter_beside_the_compiled_one(kind, tmp_path):
    name = "canny" if kind == "the same name" else "other"
    other = make_adapter(seed=5)
    if kind == "a folder":
        other.save_pretrained(tmp_path / "other")
        other = tmp_path / "other"
    ours = LocalControlPipeline.from_engine(engines.folder("onnxruntime"), {name: other})
    theirs = LocalControlPipeline.from_pretrained(
        saved_model.folder(), {"canny": engines.adapter(), name: other}, device="cpu"
    )
    regions = [
        Region(condition(), mask=LEFT, scale=0.7),
        Region(condition(1), mask=RIGHT, adapter=name, scale=0.9, start=0.25),
    ]
    wanted = call(theirs, regions=regions)
    assert_same_picture(call(ours, regions=regions), wanted)
    assert not torch.allclose(call(torch_pipe(), regions=regions[:1]).latents, wanted.latents, atol=1e-2)


@pytest.mark.parametrize("components", [UNET_ONLY, MOST], ids=["unet", "all but VAE and second encoder"])
def test_what_was_not_compiled_is_loaded_from_the_model(components):
    adapters = {} if "adapter" in components else {"canny": engines.adapter()}
    pipe = LocalControlPipeline.from_engine(engines.folder("onnxruntime", components), adapters)
    assert isinstance(pipe.model.text_encoders[0], EngineTextEncoder) == ("text_encoder" in components)
    for case in ("mask", "two images"):
        assert_same_picture(call(pipe, **CALLS[case]), expected(case))


def other_model(to: Path, part: str) -> Path:
    """The model's folder with one part's first weight changed."""
    folder = saved_model.copy_folder(to)
    path = next((folder / part).glob("*.safetensors"))
    edit_tensors(path, lambda tensors: next(iter(tensors.values())).add_(0.1))
    return folder


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_another_models_weights_are_refused(part, tmp_path):
    with pytest.raises(InputError, match=rf"manifest: model\.weights\.{part}\); rebuild it: ") as caught:
        LocalControlPipeline.from_engine(
            engines.folder("onnxruntime", UNET_ONLY), model=other_model(tmp_path, part)
        )
    assert "\n" not in str(caught.value)


def test_a_model_that_was_changed_since_is_refused(tmp_path):
    """The one that the manifest names, where parts of it are needed."""
    folder = engines.copy_folder("onnxruntime", tmp_path, UNET_ONLY)
    manifest = read_manifest(folder)
    model = {**manifest.model, "source": str(other_model(tmp_path, "vae"))}
    edit_json(folder / "manifest.json", model=model)
    with pytest.raises(InputError, match=r"model\.weights\.vae"):
        LocalControlPipeline.from_engine(folder)


@pytest.mark.parametrize("damage", ["cut short", "edited", "missing"])
@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_damaged_engine_is_refused(target, damage, tmp_path):
    folder = engines.copy_folder(target, tmp_path)
    for file in read_manifest(folder).engines["unet"].files:
        path = folder / file
        content = path.read_bytes()
        if damage == "cut short":
            path.write_bytes(content[:-1])
        elif damage == "edited":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            path.unlink()
        said = {"cut short": "cut short or edited", "edited": "sha256 differs", "missing": "is missing"}
        with pytest.raises(InputError, match=rf"{file}.*{said[damage]}.*; rebuild it: "):
            LocalControlPipeline.from_engine(folder)
        path.write_bytes(content)


def test_a_folder_without_a_unet(tmp_path):
    folder = engines.copy_folder("onnxruntime", tmp_path)
    parts = json.loads((folder / "manifest.json").read_text())["engines"]
    edit_json(folder / "manifest.json", engines={"vae_decoder": parts["vae_decoder"]})
    with pytest.raises(InputError, match="it has no unet; rebuild it: "):
        LocalControlPipeline.from_engine(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 128}, r"height 128: .* built for 32 to 96"),
        ({"width": 16}, r"width 16: .* built for 32 to 96"),
        ({"images_per_prompt": 3}, r"rows of the UNet .* 6: .* built for 1 to 4"),
        ({"regions": [Region(condition(), adapter="depth")]}, r"adapter 'depth' is unknown.*canny"),
    ],
    ids=["height", "width", "images", "adapter"],
)
def test_a_call_that_does_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        call(engine_pipe("onnxruntime"), **options)


@pytest.mark.parametrize("count", [3, 4])
def test_more_images_without_guidance(count):
    """The UNet's rows suffice for twice the images there: they are right, or refused before the first step."""
    steps = []
    options = {**CALLS["no guidance"], "images_per_prompt": count}
    try:
        made = call(engine_pipe("onnxruntime"), **options, on_step=steps.append)
    except InputError:
        assert not steps
    else:
        assert_same_picture(made, call(torch_pipe(), **options))


@pytest.mark.parametrize("what", ["nothing", "a folder", "a model"])
def test_what_is_no_engine_folder(what, tmp_path):
    folder = {"nothing": tmp_path / "none", "a folder": tmp_path, "a model": saved_model.folder()}[what]
    with pytest.raises(InputError, match="no manifest.json in it"):
        LocalControlPipeline.from_engine(folder)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Small changes of attention, convolution and both text encoders."""
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    torch.manual_seed(0)
    write_lora(path, load_folder(saved_model.folder(), dtype=torch.float32), LAYERS)
    return path


@pytest.fixture(scope="module")
def with_lora(lora) -> LocalControlPipeline:
    return LocalControlPipeline.from_pretrained(
        saved_model.folder(), {"canny": engines.adapter()}, device="cpu", loras=[(lora, 0.3)]
    )


@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_lora_is_put_into_the_open_engines(target, lora, with_lora):
    """The pictures are those of the LoRA fused in torch; opened again without it the engines are as before."""
    base = call(engine_pipe(target), **CALLS["mask"]).latents
    pipe = LocalControlPipeline.from_engine(engines.folder(target), loras=[(lora, 0.3)])
    gc.collect()
    wanted = call(with_lora, **CALLS["mask"])
    assert_same_picture(call(pipe, **CALLS["mask"]), wanted)
    assert not torch.allclose(wanted.latents, expected("mask").latents, atol=1e-2)
    again = LocalControlPipeline.from_engine(engines.folder(target))
    assert torch.equal(call(again, **CALLS["mask"]).latents, base)


@pytest.mark.parametrize("components", [UNET_ONLY, MOST], ids=["unet", "all but VAE and second encoder"])
def test_a_lora_reaches_the_parts_that_were_not_compiled(components, lora, with_lora):
    adapters = {"canny": engines.adapter()}
    folder = engines.folder("onnxruntime", components)
    pipe = LocalControlPipeline.from_engine(folder, adapters, loras=[(lora, 0.3)])
    assert_same_picture(call(pipe, **CALLS["mask"]), call(with_lora, **CALLS["mask"]))


def test_a_lora_with_the_model_elsewhere(tmp_path, lora, with_lora):
    """`model` says where it is now, for the LoRA as for the parts that were not compiled."""
    folder = engines.copy_folder("onnxruntime", tmp_path)
    model = {**read_manifest(folder).model, "source": str(tmp_path / "moved")}
    edit_json(folder / "manifest.json", model=model)
    pipe = LocalControlPipeline.from_engine(folder, model=saved_model.folder(), loras=[(lora, 0.3)])
    assert_same_picture(call(pipe, **CALLS["mask"]), call(with_lora, **CALLS["mask"]))


def test_a_lora_without_refit(tmp_path, lora):
    folder = engines.copy_folder("onnxruntime", tmp_path)
    edit_json(folder / "manifest.json", refit=False)
    with pytest.raises(InputError, match="built without --refit; rebuild it: .* --refit"):
        LocalControlPipeline.from_engine(folder, loras=[lora])


def test_a_lora_that_does_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.safetensors: weight file missing"):
        LocalControlPipeline.from_engine(
            engines.folder("onnxruntime"), loras=[tmp_path / "nowhere.safetensors"]
        )


@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_run_within_a_run_leaves_the_outer_one_alone(target):
    """Both fill the same tensors of the engine."""
    pipe = engine_pipe(target)
    call_outer = {"steps": 4, "seed": 1, "height": 64, "width": 64}
    alone = pipe(PROMPT, **call_outer).latents

    def interrupt(progress) -> None:
        if progress.step == 2:
            pipe("a blue star", [Region(condition())], steps=2, seed=9, height=64, width=64)

    assert torch.equal(pipe(PROMPT, **call_outer, on_step=interrupt).latents, alone)


def test_decoding_outside_of_a_call():
    result = call(engine_pipe("onnxruntime"))
    assert engine_pipe("onnxruntime").decode(result.latents).isfinite().all()


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "vae/config.json"])
def test_an_edited_config_is_refused(name, tmp_path):
    folder = engines.copy_folder("onnxruntime", tmp_path)
    edit_json(folder / "model" / name, edited=True)
    with pytest.raises(InputError, match=rf"model/{name} .*; rebuild it: "):
        LocalControlPipeline.from_engine(folder)
