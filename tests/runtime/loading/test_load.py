"""runtime.loading.load: every source gives the same model; a diffusers pipeline's weights are shared, not copied."""

import copy
import gc
import shutil

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    HeunDiscreteScheduler,
    StableDiffusionXLAdapterPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from runtime.errors import InputError
from runtime.loading import load as loading
from runtime.loading.load import from_diffusers, load_model
from runtime.text.encode import encode_prompts
from tests.support import saved_model
from tests.support.saved_model import cached_snapshot, copy_folder, edit_json, edit_tensors, options
from tests.support.tiny import make_adapter, make_pipeline

TOO_LONG = "x" * 300  # of a file's name, which the system says an error of

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def assert_weights(module, expected, dtype=torch.float32):
    state, expected = module.state_dict(), expected.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value.to(dtype)), name


def assert_model(model, dtype=torch.float32, vae_dtype=None):
    pipe = saved_model.pipeline()
    assert_weights(model.unet, pipe.unet, dtype)
    assert_weights(model.vae, pipe.vae, vae_dtype or dtype)
    assert_weights(model.text_encoders[0], pipe.text_encoder, dtype)
    assert_weights(model.text_encoders[1], pipe.text_encoder_2, dtype)
    for tokenizer, expected in zip(model.tokenizers, (pipe.tokenizer, pipe.tokenizer_2), strict=True):
        assert (
            tokenizer("a box", padding="max_length").input_ids
            == expected("a box", padding="max_length").input_ids
        )
    assert options(model.scheduler) == options(pipe.scheduler)
    assert model.force_zeros_for_empty_prompt is True


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Hugging Face's cache, with the repository someone/tiny in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(saved_model.folder(), cached_snapshot(tmp_path / "cache", "someone/tiny"))
    return tmp_path / "cache"


@pytest.mark.parametrize("source", ["embedded", "folder", "single file", "hub id"])
def test_every_source_gives_the_same_model(source, cache, monkeypatch):
    monkeypatch.setattr(loading, "EMBEDDED", saved_model.folder())
    single_file = saved_model.single_file()
    sources = {"folder": str(saved_model.folder()), "single file": single_file, "hub id": "someone/tiny"}
    path = sources.get(source, "embedded")
    model = load_model(path, config=saved_model.folder() if source == "single file" else None)
    assert model.name == str(path)
    assert_model(model)
    assert not any(weight.requires_grad for weight in model.unet.parameters())


@pytest.mark.parametrize("source", ["folder", "single file"])
@pytest.mark.parametrize(
    ("dtype", "upcast", "vae_dtype"),
    [
        (torch.float16, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_a_vae_that_overflows_in_float16_stays_in_float32(tmp_path, source, dtype, upcast, vae_dtype):
    folder = copy_folder(tmp_path)
    edit_json(folder / "vae" / "config.json", force_upcast=upcast)
    path = folder if source == "folder" else saved_model.single_file()
    config = folder if path.is_file() else None
    assert_model(load_model(path, dtype=dtype, config=config), dtype, vae_dtype)


def test_the_diffusers_unet_is_let_go():
    def count():
        gc.collect()
        return sum(type(thing) is UNet2DConditionModel for thing in gc.get_objects())

    saved_model.folder()
    before = count()
    model = load_model(saved_model.folder())
    assert count() == before
    assert_weights(model.unet, saved_model.pipeline().unet)


@pytest.fixture
def other_vae(tmp_path):
    """A VAE of the same shape and other weights, saved as diffusers does."""
    vae = AutoencoderKL.from_config(saved_model.pipeline().vae.config)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    return vae, tmp_path / "pipeline"


@pytest.mark.parametrize("place", ["pipeline", "folder", "file", "hub id"])
def test_another_vae(place, other_vae, cache):
    vae, pipeline = other_vae
    sources = {
        "pipeline": pipeline,
        "folder": pipeline / "vae",
        "file": pipeline / VAE,
        "hub id": "someone/vae",
    }
    if place == "hub id":
        shutil.copytree(pipeline / "vae", cached_snapshot(cache, "someone/vae"))
    model = load_model(saved_model.folder(), vae=sources[place])
    assert_weights(model.vae, vae)
    assert_weights(model.unet, saved_model.pipeline().unet)


def test_a_vae_that_does_not_fit(tmp_path, other_vae):
    config = dict(saved_model.pipeline().vae.config) | {"latent_channels": 8}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="takes 4 channels, the latent has 8"):
        load_model(saved_model.folder(), vae=tmp_path / "wide")
    with pytest.raises(InputError, match="vae nowhere: no such file or folder"):
        load_model(saved_model.folder(), vae="nowhere")
    with pytest.raises(
        InputError, match=r"vae someone/else: no such file or folder \(looked in .*models--someone--else"
    ):
        load_model(saved_model.folder(), vae="someone/else")


def test_loras_are_fused_and_checked_before_anything_is_loaded(tmp_path, monkeypatch):
    name = "mid_block.attentions.0.proj_in"
    weight = saved_model.pipeline().unet.get_submodule(name).weight
    tensors = {"lora_A": torch.ones(1, weight.shape[1]), "lora_B": torch.ones(weight.shape[0], 1)}
    path = tmp_path / "x.safetensors"
    save_file({f"unet.{name}.{half}.weight": value for half, value in tensors.items()}, path)
    model = load_model(saved_model.folder(), loras=[path, (path, 0.25)])
    assert torch.allclose(model.unet.get_submodule(name).weight, weight + 1.25, atol=1e-6)

    monkeypatch.setattr(loading, "load_folder", None)
    with pytest.raises(InputError, match=r"nowhere\.safetensors: weight file missing"):
        load_model(saved_model.folder(), loras=[tmp_path / "nowhere.safetensors"])


def test_a_bad_weight_is_named(tmp_path):
    folder = copy_folder(tmp_path)
    edit_tensors(folder / UNET, lambda tensors: tensors["conv_in.weight"].view(-1)[3].fill_(float("nan")))
    with pytest.raises(
        InputError, match="model: NaN or infinity in the weights, first in unet conv_in.weight"
    ):
        load_model(folder)


def test_an_embedded_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path / "embedded")
    with pytest.raises(InputError, match=r"embedded: model_index\.json missing"):
        load_model()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "model nowhere: no such file or folder; expected embedded, a diffusers folder"),
        ("./no/where", "no such file or folder"),
        ("https://huggingface.co/a/b", "no such file or folder"),
        ("some/where", "model some/where: not on this disk, looked in .*models--some--where"),
        (__file__, r"not a weight file \(\.py\); expected a \.safetensors file"),
    ],
)
def test_a_source_that_is_none(source, message, cache):
    with pytest.raises(InputError, match=message):
        load_model(source)


@pytest.mark.parametrize(
    "given",
    [{"source": TOO_LONG}, {"vae": TOO_LONG}, {"loras": [TOO_LONG]}, {"loras": [(TOO_LONG, 0.5)]}],
    ids=["model", "vae", "lora", "lora with a weight"],
)
def test_a_name_that_no_file_can_have_is_one_line(given):
    with pytest.raises(InputError, match="File name too long|no such file|missing"):
        load_model(**{"source": saved_model.folder(), **given})


def test_a_home_is_found_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(saved_model.folder())
    assert load_model("~/model", vae="~/model/vae").vae.dtype == torch.float32
    with pytest.raises(InputError, match=str(tmp_path / r"x\.safetensors: weight file missing")):
        load_model(saved_model.folder(), loras=["~/x.safetensors"])


def test_a_dtype_that_is_none():
    with pytest.raises(InputError, match="expected float32, bfloat16 or float16"):
        load_model(saved_model.folder(), dtype=torch.float64)


def test_loading_prints_nothing(capfd):
    load_model(saved_model.folder())
    assert capfd.readouterr() == ("", "")


def test_a_pipeline_shares_its_weights():
    pipe = saved_model.pipeline()
    model = from_diffusers(pipe)
    assert_model(model)
    shared = dict(pipe.unet.named_parameters())
    assert all(weight.data_ptr() == shared[name].data_ptr() for name, weight in model.unet.named_parameters())
    assert model.vae is pipe.vae
    assert model.text_encoders == (pipe.text_encoder, pipe.text_encoder_2)


def components():
    return {**saved_model.pipeline().components}


def test_an_adapter_pipeline():
    parts = {
        name: part
        for name, part in components().items()
        if name not in ("feature_extractor", "image_encoder")
    }
    pipe = StableDiffusionXLAdapterPipeline(
        **parts, adapter=make_adapter(), force_zeros_for_empty_prompt=False
    )
    model = from_diffusers(pipe, name="mine")
    assert model.name == "mine"
    assert model.force_zeros_for_empty_prompt is False
    assert_weights(model.unet, saved_model.pipeline().unet)


def test_a_float16_pipeline_keeps_its_vae():
    parts = components()
    half = copy.deepcopy(parts["vae"]).half()
    pipe = type(saved_model.pipeline())(**parts | {"vae": half})
    model = from_diffusers(pipe)
    assert half.dtype == torch.float16
    assert model.vae.dtype == torch.float32
    assert_weights(model.vae, half)


@pytest.mark.parametrize("absent", [["text_encoder"], ["text_encoder_2", "tokenizer_2"], ["scheduler"]])
def test_a_pipeline_without_a_part(absent):
    pipe = type(saved_model.pipeline())(**components() | dict.fromkeys(absent))
    with pytest.raises(
        InputError, match=f"it has no {', '.join(absent)}; expected an SDXL text-to-image model"
    ):
        from_diffusers(pipe)


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_a_pipeline_with_a_lora_that_is_not_fused(part):
    parts = components()
    parts[part] = copy.deepcopy(parts[part])
    target = "to_q" if part == "unet" else "q_proj"
    try:
        parts[part].add_adapter(LoraConfig(target_modules=[target]))
    except ValueError as error:  # transformers 5.24 asks for a peft that is not out
        pytest.skip(str(error))
    with pytest.raises(InputError, match="has LoRA layers; expected them fused"):
        from_diffusers(type(saved_model.pipeline())(**parts))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_pipeline_whose_weights_are_away(part):
    pipe = make_pipeline()
    cpu_offload(getattr(pipe, part), torch.device("cpu"))  # as enable_sequential_cpu_offload does for a GPU
    with pytest.raises(
        InputError, match=f"the weights of its {part} are offloaded; expected a pipeline without"
    ):
        from_diffusers(pipe)


def quantized(unet):
    return torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, dtype=torch.qint8)


def in_8_bits(unet):
    return unet.to(torch.float8_e4m3fn)


def normalized(unet):
    nn.utils.parametrizations.weight_norm(unet.conv_in)
    return unet


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(
    ("change", "first"),
    [
        (quantized, "time_embedding.linear_1.weight"),
        (in_8_bits, "conv_in.weight"),
        (normalized, "conv_in.weight"),
    ],
)
def test_a_unet_of_other_weights_than_its_config_says(change, first):
    pipe = make_pipeline()
    pipe.unet = change(pipe.unet)
    with pytest.raises(
        InputError, match=f"weights are not as its config says, first {first} .*; expected plain"
    ) as error:
        from_diffusers(pipe)
    assert len(str(error.value)) < 300


def test_a_tokenizer_that_is_too_large():
    parts = components()
    tokenizer = copy.deepcopy(parts["tokenizer"])
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match="the tokenizer has .* tokens, its text encoder"):
        from_diffusers(type(saved_model.pipeline())(**parts | {"tokenizer": tokenizer}))


@pytest.mark.parametrize("length", [None, 512, 10**30])
def test_a_tokenizer_that_says_no_length_has_the_encoders(tmp_path, length):
    model = copy_folder(tmp_path)
    for part in ("tokenizer", "tokenizer_2"):
        edit_json(model / part / "tokenizer_config.json", model_max_length=length)
    made, plain = load_model(model), load_model(saved_model.folder())
    for left, right in zip(
        encode_prompts(made, ["a cat " * 60]), encode_prompts(plain, ["a cat " * 60]), strict=True
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((2, 2), "2; expected 3 or more"),
        (("77", 77), "'77'"),
        ((77, 50), "77 and 50; expected the same"),
    ],
)
def test_a_tokenizers_length_that_cannot_be(tmp_path, lengths, message):
    model = copy_folder(tmp_path)
    for part, length in zip(("tokenizer", "tokenizer_2"), lengths, strict=True):
        edit_json(model / part / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(InputError, match=f"model_max_length is {message}"):
        load_model(model)


@pytest.mark.parametrize("size", ["8", [], [8, None], 8.5])
def test_a_sample_size_that_is_no_number(tmp_path, size):
    edit_json(copy_folder(tmp_path) / "unet/config.json", sample_size=size)
    with pytest.raises(InputError, match=r"model: the UNet's sample_size is .*; expected a whole number, or"):
        load_model(tmp_path / "model")


def test_what_the_user_says_of_the_prediction_counts():
    assert load_model(saved_model.folder()).scheduler.config.prediction_type == "epsilon"
    made = load_model(saved_model.folder(), prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert made.scheduler.config.prediction_type == "v_prediction"
    assert (
        made.scheduler.config.rescale_betas_zero_snr and made.scheduler.config.timestep_spacing == "trailing"
    )
    with pytest.raises(InputError, match="prediction_type 'flow': expected epsilon or v_prediction"):
        load_model(saved_model.folder(), prediction_type="flow")


def test_zero_snr_counts_with_a_scheduler_that_has_no_option_for_it(tmp_path):
    folder, own = copy_folder(tmp_path), saved_model.pipeline().scheduler
    HeunDiscreteScheduler.from_config(own.config).save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"])
    made = load_model(folder, rescale_betas_zero_snr=True).scheduler
    expected = type(own).from_config(own.config, rescale_betas_zero_snr=True).alphas_cumprod
    assert type(made) is HeunDiscreteScheduler
    torch.testing.assert_close(made.alphas_cumprod, expected, rtol=1e-3, atol=1e-9)
