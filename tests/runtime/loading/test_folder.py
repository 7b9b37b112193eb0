"""runtime.loading.folder: a diffusers folder loads to the bit; what is wrong with one is said in a line."""

import pytest
import torch

from runtime.errors import InputError
from runtime.loading.folder import load_folder
from tests.support import saved_model
from tests.support.saved_model import assert_same, copy_folder, edit_json, edit_tensors

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
POOLED = "text_encoder_2/model.safetensors"


def load(folder, **options):
    return load_folder(folder, dtype=torch.float32, **options)


def test_loads_to_the_bit():
    assert_same(load(saved_model.folder()))


@pytest.mark.parametrize("kind", ["variant", "shards"])
def test_variant_and_shards(tmp_path, kind):
    size = (saved_model.folder() / UNET).stat().st_size
    options = {"variant": "fp16"} if kind == "variant" else {"max_shard_size": size // 3}
    saved_model.pipeline().save_pretrained(tmp_path, **options)
    assert not (tmp_path / UNET).exists()
    assert_same(load(tmp_path))


def test_pickles_load_only_when_asked_for(tmp_path):
    saved_model.pipeline().save_pretrained(tmp_path)
    pickle = (tmp_path / UNET).with_suffix(".bin")
    torch.save(saved_model.pipeline().unet.state_dict(), pickle)
    (tmp_path / UNET).unlink()
    with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model\.bin: a pickle"):
        load(tmp_path)
    assert_same(load(tmp_path, allow_pickle=True))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def drop_last(tensors):
    del tensors[sorted(tensors)[-1]]


def double_first(tensors):
    name = sorted(tensors)[0]
    tensors[name] = torch.cat([tensors[name]] * 2)


def without(*parts):
    return {part: [None, None] for part in parts}


SPOILED = {
    "no index": (lambda m: (m / "model_index.json").unlink(), r"model_index\.json missing"),
    "index no JSON": (lambda m: (m / "model_index.json").write_text("{"), r"model_index\.json: not a JSON"),
    "no config": (lambda m: (m / "vae/config.json").unlink(), r"vae/config\.json: missing"),
    "no weights": (lambda m: (m / UNET).unlink(), "unet: weight file missing"),
    "cut weights": (lambda m: cut(m / POOLED), r"text_encoder_2/model\.safetensors: not a whole"),
    "weight missing, diffusers": (
        lambda m: edit_tensors(m / UNET, drop_last),
        "unet: 1 weights .* missing, first",
    ),
    "weight missing, transformers": (
        lambda m: edit_tensors(m / TEXT, drop_last),
        "text_encoder: 1 weights .* missing",
    ),
    "other shape, diffusers": (
        lambda m: edit_tensors(m / UNET, double_first),
        r"unet: \S+ is \[.*expects \[",
    ),
    "other shape, transformers": (
        lambda m: edit_tensors(m / TEXT, double_first),
        r"text_encoder: \S+ is \[.*expects \[",
    ),
    "no tokenizer": (lambda m: (m / "tokenizer_2/tokenizer.json").unlink(), "tokenizer_2: tokenizer missing"),
    "cut tokenizer": (lambda m: cut(m / "tokenizer/tokenizer.json"), "tokenizer or scheduler not readable"),
    "no scheduler": (lambda m: (m / "scheduler/scheduler_config.json").unlink(), "tokenizer or scheduler"),
    "Stable Diffusion 1": (
        lambda m: edit_json(
            m / "model_index.json",
            _class_name="StableDiffusionPipeline",
            **without("text_encoder_2", "tokenizer_2"),
        ),
        "a StableDiffusionPipeline, without text_encoder_2, tokenizer_2; expected an SDXL text-to-image model",
    ),
    "refiner": (
        lambda m: edit_json(m / "model_index.json", **without("text_encoder", "tokenizer")),
        "the SDXL refiner, without text_encoder, tokenizer; expected",
    ),
    "other VAE": (
        lambda m: edit_json(m / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        "vae is a Auto",
    ),
    "inpainting": (
        lambda m: edit_json(m / "unet/config.json", in_channels=9),
        "an inpainting model: it takes 9",
    ),
    "editing": (lambda m: edit_json(m / "unet/config.json", in_channels=8), "an image-editing model"),
    "other UNet": (
        lambda m: edit_json(m / "unet/config.json", addition_embed_type=None),
        "model: .*addition_embed",
    ),
    **{
        f"{key} {value!r}": (
            lambda m, key=key, value=value: edit_json(m / "vae/config.json", **{key: value}),
            f"the VAE's {key} is .*; expected (4 numbers|a number other than 0)",
        )
        for key, value in [
            ("scaling_factor", None),
            ("scaling_factor", "0.13"),
            ("scaling_factor", 0),
            ("latents_mean", [0.1] * 3),
            ("latents_std", "1"),
            ("latents_std", [1.0, 1.0, 1.0, None]),
        ]
    },
    "other text": (
        lambda m: edit_json(m / "unet/config.json", cross_attention_dim=7),
        "UNet expects 7 text features",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_wrong_is_said(tmp_path, case):
    spoil, message = SPOILED[case]
    model = copy_folder(tmp_path)
    spoil(model)
    with pytest.raises(InputError, match=message) as error:
        load(model)
    assert str(model) in str(error.value)


def test_a_weight_too_many_is_warned_of(tmp_path):
    model = copy_folder(tmp_path)
    edit_tensors(model / UNET, lambda tensors: tensors.update(stray=torch.zeros(2)))
    with pytest.warns(UserWarning, match="1 weights unknown .* first stray"):
        assert_same(load(model))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scale_weight", "weights with scales"),
        ("weight_scale", "weights with scales"),
        ("comfy_quant", "weights with scales"),
        ("weight.absmax", "a bitsandbytes model"),
    ],
)
def test_a_scale_is_not_left_out(tmp_path, part, name, message):
    file = copy_folder(tmp_path) / {"unet": UNET, "text_encoder": TEXT}[part]

    def add(tensors):
        first = next(key for key in tensors if key.endswith(".weight"))
        tensors[f"{first.removesuffix('.weight')}.{name}"] = torch.ones(1)

    edit_tensors(file, add)
    with pytest.raises(InputError, match=rf"{part}/\S*: {message} \(.*expected fp32, fp16 or bf16"):
        load(tmp_path / "model")


def test_whole_numbers_are_refused(tmp_path):
    folder = copy_folder(tmp_path)
    edit_tensors(folder / UNET, lambda t: t.update({"conv_in.weight": t["conv_in.weight"].to(torch.int8)}))
    with pytest.raises(InputError, match=r"conv_in\.weight is in whole numbers without a scale"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "quanto"}, "quanto"),
        ({"load_in_8bit": True}, "8 bits"),
        (5, "5"),
    ],
)
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_quantised_part_is_named(tmp_path, part, config, method):
    folder = copy_folder(tmp_path)
    edit_json(folder / part / "config.json", quantization_config=config)
    with pytest.raises(
        InputError, match=rf"{part}: its weights are quantised \({method}\), which is not read"
    ):
        load(folder)
