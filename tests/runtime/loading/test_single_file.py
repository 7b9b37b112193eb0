"""runtime.loading.single_file: the original SDXL layout loads to the bit, and the configs shipped for it are SDXL's."""

import json
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from runtime.errors import InputError
from runtime.loading.folder import check_configs
from runtime.loading.single_file import (
    SDXL_CONFIGS,
    UNET,
    load_single_file,
    load_tokenizers,
    load_vae_file,
    place_projection,
)
from runtime.machine.files import read_json
from runtime.model.config import UNetConfig
from runtime.model.unet import UNet
from runtime.sampling.schedulers import make_scheduler
from tests.support import saved_model
from tests.support.saved_model import assert_same, cached_snapshot, edit_tensors, options
from tests.support.single_file_layout import to_single_file, vae_tensors


def load(path, **arguments):
    return load_single_file(path, dtype=torch.float32, config=saved_model.folder(), **arguments)


def test_round_trip_to_the_bit():
    assert_same(load(saved_model.single_file()))


def test_a_checkpoint_loads_only_when_asked_for(tmp_path):
    torch.save(
        {"state_dict": load_file(saved_model.single_file()), "global_step": 7}, tmp_path / "model.ckpt"
    )
    with pytest.raises(InputError, match=r"model\.ckpt: a pickle"):
        load(tmp_path / "model.ckpt")
    assert_same(load(tmp_path / "model.ckpt", allow_pickle=True))


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        ([], {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
        (["v_pred"], {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}),
        (["v_pred", "ztsnr"], {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        (["v_pred", "ztsnr"], {"rescale_betas_zero_snr": True}),
    ],
)
def test_marker_tensors_set_the_noise_schedule(tmp_path, markers, expected):
    path = edit_tensors(
        saved_model.single_file(),
        lambda tensors: tensors.update({name: torch.zeros(0) for name in markers}),
        tmp_path / "model.safetensors",
    )
    assert expected.items() <= options(load(path).scheduler).items()


def with_header(folder, **metadata):
    path = folder / "model.safetensors"
    save_file(load_file(saved_model.single_file()), path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("epsilon", "epsilon"),
        *((v, "v_prediction") for v in ("v", "v-prediction", "V_Prediction", "v_pred", "vpred")),
    ],
)
def test_the_header_says_what_is_predicted(tmp_path, declared, expected):
    path = with_header(tmp_path, **{"modelspec.prediction_type": declared})
    assert load(path).scheduler.config.prediction_type == expected


def test_a_header_that_says_something_else_is_refused(tmp_path):
    path = with_header(tmp_path, **{"modelspec.prediction_type": "flow"})
    with pytest.raises(InputError, match="its header says prediction_type 'flow'; expected epsilon"):
        load(path)


def scaled(tensors, spelling: str, per_output: bool):
    """Every linear layer's and convolution's weight of the UNet and the first text encoder in float8, with a scale."""
    expected = {}
    for name in [
        n
        for n in tensors
        if n.endswith(".weight") and tensors[n].ndim > 1 and "embed" not in n.split(".")[-2]
    ]:
        if not name.startswith(("model.diffusion_model.", "conditioner.embedders.0.")):
            continue
        weight = tensors[name].float()
        largest = weight.flatten(1).abs().amax(1) if per_output else weight.abs().max()
        scale = (largest / 448).clamp_min(1e-12)
        tensors[name] = (weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).to(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + spelling] = scale
        expected[name] = tensors[name].float() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return expected


@pytest.mark.parametrize("per_output", [False, True], ids=["a scale", "a scale an output"])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_float8_weights_are_multiplied_by_their_scales(tmp_path, spelling, per_output):
    tensors = load_file(saved_model.single_file())
    expected = scaled(tensors, spelling, per_output)
    tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "fp8.safetensors")
    save_file(load_file(saved_model.single_file()) | expected, tmp_path / "fp32.safetensors")
    made, plain = load(tmp_path / "fp8.safetensors"), load(tmp_path / "fp32.safetensors")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for (name, left), right in zip(
            getattr(made, part).named_parameters(), getattr(plain, part).parameters(), strict=True
        ):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=0, msg=name)
    assert len(expected) > 50


def described(text: bytes):
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weight_scale": torch.ones(1, 64)}, r"scales of shape \(1, 64\); expected a finite one, or 64"),
        ({"weight_scale": torch.ones(8, 8)}, r"scales of shape \(8, 8\); expected a finite one, or 64"),
        (
            {"weight_scale": torch.ones(()), "scale_weight": torch.ones(())},
            "the layer has two scales; expected one",
        ),
        ({"comfy_quant": described(b'{"format": "float8_e4m3fn"}')}, "weights in float8 without their scale"),
        (
            {"comfy_quant": described(b'{"format": "int8_tensorwise"}')},
            "weights in int8_tensorwise, which is not read",
        ),
        (
            {"comfy_quant": described(b'{"format": "float8_e4m3fn", "convrot": true}')},
            "weights with convrot, which is not read",
        ),
        ({"comfy_quant": described(b"[")[None]}, "not JSON"),
    ],
)
def test_scales_that_are_not_one_or_one_an_output_are_refused(tmp_path, more, message):
    """The layer is square: a scale for each input has as many numbers as one for each output."""
    layer = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q."
    tensors = load_file(saved_model.single_file())
    assert tensors[f"{layer}weight"].shape == (64, 64)
    tensors[f"{layer}weight"] = tensors[f"{layer}weight"].to(torch.float8_e4m3fn)
    save_file(tensors | {layer + kind: value for kind, value in more.items()}, tmp_path / "fp8.safetensors")
    with pytest.raises(InputError, match=rf"fp8\.safetensors: {layer}\w+: {message}"):
        load(tmp_path / "fp8.safetensors")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"layers": {"%s": {"format": "int8_tensorwise", "convrot": true}}}', "weights in int8_tensorwise"),
        ('{"layers": {"%s": {"format": "float8_e4m3fn", "convrot": true}}}', "weights with convrot"),
        ('{"layers": {"%s": {"format": "float8_e4m3fn"}}}', "weights in float8 without their scale"),
        ('{"layers": ["%s"]}', "expected an object"),
        ("[", "_quantization_metadata is not JSON with layers"),
    ],
)
def test_what_a_header_says_of_the_weights_is_followed(tmp_path, said, message):
    """ComfyUI writes there what else is in a layer's comfy_quant."""
    layer = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    tensors = load_file(saved_model.single_file())
    kind, scale = (torch.int8, True) if "int8" in said else (torch.float8_e4m3fn, "convrot" in said)
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(kind)
    tensors |= {f"{layer}.weight_scale": torch.ones(())} if scale else {}
    said = said % layer if "%" in said else said
    save_file(tensors, tmp_path / "fp8.safetensors", metadata={"_quantization_metadata": said})
    with pytest.raises(InputError, match=message):
        load(tmp_path / "fp8.safetensors")


def test_scales_of_a_checkpoint_are_read(tmp_path):
    tensors = load_file(saved_model.single_file())
    expected = scaled(tensors, "scale_weight", False)
    torch.save({"state_dict": tensors}, tmp_path / "fp8.ckpt")
    unet = load(tmp_path / "fp8.ckpt", allow_pickle=True).unet
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    made = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    torch.testing.assert_close(made.detach(), expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.diffusion_model.nothing.weight",
            "nothing.weight: a tensor that SDXL's UNet does not",
        ),
        (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.2.mlp.fc1.weight",
            "first text encoder",
        ),
        (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc3.bias",
            "first text encoder",
        ),
        (
            "conditioner.embedders.1.model.transformer.resblocks.2.ln_1.weight",
            "second text encoder does not have",
        ),
        ("conditioner.embedders.1.model.visual.proj", "second text encoder does not have"),
        ("conditioner.embedders.1.model.x.scale_weight", "the scale of a layer that is not known here"),
        ("model.diffusion_model.out.2.weight.absmax", "a bitsandbytes model"),
        ("model.diffusion_model.out.2.qweight", "a GPTQ, AWQ or nunchaku model"),
    ],
)
def test_a_tensor_that_nothing_takes_is_named(tmp_path, name, message):
    path = edit_tensors(
        saved_model.single_file(), lambda t: t.update({name: torch.ones(1)}), tmp_path / "model.safetensors"
    )
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "model_ema.decay", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "betas", "denoiser.sigmas",
        "first_stage_model.loss.logvar", "conditioner.embedders.1.model.attn_mask",
        "conditioner.embedders.0.transformer.logit_scale",
    ],
)  # fmt: skip
def test_what_checkpoints_carry_beside_is_passed_over(tmp_path, name, recwarn):
    path = edit_tensors(
        saved_model.single_file(), lambda t: t.update({name: torch.ones(1)}), tmp_path / "model.safetensors"
    )
    assert_same(load(path))
    assert not [w for w in recwarn if "not read" in str(w.message)]


def test_tensors_of_no_part_are_warned_of(tmp_path):
    path = edit_tensors(
        saved_model.single_file(),
        lambda t: t.update({"hyper.x": torch.ones(1)}),
        tmp_path / "model.safetensors",
    )
    with pytest.warns(UserWarning, match="1 tensors of no part of SDXL are not read, first hyper.x"):
        assert_same(load(path))


@pytest.mark.parametrize("name", ["model.SAFETENSORS", "model", "model.ckpt"])
def test_the_content_counts_and_not_the_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(saved_model.single_file().read_bytes())
    assert_same(load(tmp_path / name))


KINDS = {
    "conditioner.embedders.0.model.token_embedding.weight": "the SDXL refiner",
    "cond_stage_model.model.ln_final.weight": "a Stable Diffusion 2 model",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "a Stable Diffusion 1 model",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 model",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a Flux model",
    "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": "a LoRA",
    "unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": "a LoRA",
    "control_model.zero_convs.0.0.weight": "a ControlNet",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "down_blocks.0.resnets.0.conv1.weight": "one part of a model in diffusers' layout",
    "something.else": f"no {UNET} in it",
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_files_are_named(tmp_path, name):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=rf"model\.safetensors: {KINDS[name]}.*expected an SDXL text-to-image model"
    ):
        load(tmp_path / "model.safetensors")


def widen_input(tensors, channels):
    weight = tensors[UNET]
    tensors[UNET] = torch.zeros(weight.shape[0], channels, *weight.shape[2:])


def drop(part):
    def edit(tensors):
        del tensors[next(name for name in sorted(tensors) if part in name)]

    return edit


def double(part):
    def edit(tensors):
        name = next(name for name in sorted(tensors) if part in name)
        tensors[name] = torch.cat([tensors[name]] * 2)

    return edit


SPOILED = {
    "inpainting": (lambda tensors: widen_input(tensors, 9), "an inpainting model"),
    "editing": (lambda tensors: widen_input(tensors, 8), "an image-editing model"),
    "Playground": (lambda tensors: tensors.update(edm_mean=torch.zeros(4)), "a Playground v2.5 model"),
    "CosXL": (lambda tensors: tensors.update({"edm_vpred.sigma_max": torch.ones(1)}), "a CosXL model"),
    "UNet weight missing": (
        drop("middle_block.1.proj_in.weight"),
        "does not fit SDXL's layout: a weight is missing",
    ),
    "time weight missing": (
        drop("label_emb.0.2.weight"),
        r"does not fit SDXL's layout: no label_emb\.0\.2\.weight in it",
    ),
    "text weight missing": (
        drop("embedders.0.transformer.text_model.final"),
        "1 weights of the CLIPTextModel missing",
    ),
    "pooled weight missing": (
        drop("embedders.1.model.text_projection"),
        "CLIPTextModelWithProjection missing",
    ),
    "VAE weight missing": (drop("decoder.norm_out.weight"), "not a VAE of this model: a weight is missing"),
    "other UNet": (double("input_blocks.1.0.in_layers.2.weight"), "does not fit SDXL's layout: .*shape"),
    "other VAE": (double("decoder.conv_in.weight"), "not a VAE of this model: .*shape"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_wrong_is_said(tmp_path, case):
    edit, message = SPOILED[case]
    path = edit_tensors(saved_model.single_file(), edit, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"model\.safetensors: .*{message}"):
        load(path)


def test_a_file_without_vae_needs_another(tmp_path):
    def without_vae(tensors):
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    path = edit_tensors(saved_model.single_file(), without_vae, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="it has no VAE; pass one: --vae, or vae="):
        load(path)
    assert_same(load(path, vae=saved_model.pipeline().vae))


@pytest.mark.parametrize("layout", ["diffusers", "original", "whole model"])
def test_vae_files(tmp_path, layout):
    path, vae = tmp_path / "vae.safetensors", saved_model.pipeline().vae
    if layout == "whole model":
        path = saved_model.single_file()
    else:
        tensors = vae.state_dict() if layout == "diffusers" else vae_tensors(vae)
        save_file({name: value.half().contiguous() for name, value in tensors.items()}, path)
    loaded = load_vae_file(path, saved_model.folder() / "vae")
    for name, value in vae.state_dict().items():
        expected = value if layout == "whole model" else value.half().float()
        assert torch.equal(loaded.state_dict()[name], expected), name


def bare_vocabulary(folder):
    """CLIP's two files with a few letters for a vocabulary."""
    letters = [*"!abc", *(f"{letter}</w>" for letter in "!abc"), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def assert_paddings(tokenizers):
    first, second = (t("a b", padding="max_length", max_length=6).input_ids for t in tokenizers)
    assert first == [8, 5, 6, 9, 9, 9]
    assert second == [8, 5, 6, 9, 0, 0]
    assert [t.model_max_length for t in tokenizers] == [77, 77]


def test_one_vocabulary_serves_both_tokenizers(tmp_path):
    assert_paddings(load_tokenizers(bare_vocabulary(tmp_path), search=False))


@pytest.mark.parametrize(
    ("repository", "parts"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", ("tokenizer", "tokenizer_2")),
        ("openai/clip-vit-large-patch14", (".",)),
    ],
)
def test_the_vocabulary_is_found_in_the_cache(tmp_path, monkeypatch, repository, parts):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = cached_snapshot(tmp_path, repository)
    for part in parts:
        bare_vocabulary(snapshot / part)
    assert_paddings(load_tokenizers(tmp_path / "nowhere"))


def test_without_a_vocabulary_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        InputError, match=r"put vocab\.json and merges\.txt of openai/clip-vit-large-patch14"
    ) as error:
        load_single_file(saved_model.single_file(), dtype=torch.float32, config=SDXL_CONFIGS)
    assert str(tmp_path / "cache") in str(error.value)
    with pytest.raises(InputError, match=r"no tokenizer in \S*empty, .* put vocab"):
        load(saved_model.single_file(), tokenizer=tmp_path / "empty")
    bare_vocabulary(tmp_path / "broken").joinpath("vocab.json").write_text("{")
    with pytest.raises(InputError, match="broken: tokenizer not readable"):
        load(saved_model.single_file(), tokenizer=tmp_path / "broken")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        ("DDPMScheduler", {"clip_sample": False}),
        ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
        ("HeunDiscreteScheduler", {"clip_sample": False, "steps_offset": 1}),
    ],
)
def test_the_shipped_schedule_serves_other_classes_as_sdxls_own_does(name, expected):
    """Latents are no pictures, whose values end at 1; what Euler does not use, the others take from its config."""
    scheduler = EulerDiscreteScheduler.from_pretrained(SDXL_CONFIGS / "scheduler")
    own = EulerDiscreteScheduler.from_config(scheduler.config, prediction_type="v_prediction")
    assert expected.items() <= options(make_scheduler(name, own)).items()


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Module]:
    """SDXL at full size from the shipped configs: shapes only, no memory."""
    texts = (
        CLIPTextConfig.from_pretrained(SDXL_CONFIGS / name) for name in ("text_encoder", "text_encoder_2")
    )
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL_CONFIGS / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(SDXL_CONFIGS / "vae")),
            "text_encoder": CLIPTextModel(next(texts)),
            "text_encoder_2": CLIPTextModelWithProjection(next(texts)),
        }


# The parameters and tensors of sd_xl_base_1.0.safetensors: 2515 tensors, with CLIP's position_ids and logit_scale.
PARAMETERS = {"unet": 2567463684, "vae": 83653863, "text_encoder": 123060480, "text_encoder_2": 694659840}
TENSORS = {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517}
IN_THE_FILE = {
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
    "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
    "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
    "conditioner.embedders.1.model.text_projection": (1280, 1280),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
}


def test_shipped_configs_have_the_size_of_sdxl(full_size):
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in full_size.items()} == PARAMETERS
    assert {name: len(part.state_dict()) for name, part in full_size.items()} == TENSORS
    check_configs("sdxl", *(read_json(SDXL_CONFIGS / part / "config.json") for part in full_size))


def test_full_size_single_file_maps_onto_every_weight(full_size):
    pipe = StableDiffusionXLPipeline(tokenizer=None, tokenizer_2=None, scheduler=None, **full_size)
    file = to_single_file(pipe)
    assert len(file) == 2515
    assert {name: tuple(file[name].shape) for name in IN_THE_FILE} == IN_THE_FILE

    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(file), full_size["unet"].config)
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(file), full_size["vae"].config)
    pooled = single_file_utils.convert_open_clip_checkpoint(
        full_size["text_encoder_2"], dict(file), prefix="conditioner.embedders.1.model."
    )
    with torch.device("meta"):
        own = UNet(UNetConfig.from_diffusers(read_json(SDXL_CONFIGS / "unet" / "config.json")))
    for converted, model in ((unet, own), (vae, full_size["vae"]), (pooled, full_size["text_encoder_2"])):
        expected = {name: value.shape for name, value in model.state_dict().items()}
        assert {name: value.shape for name, value in converted.items()} == expected


PROJECTION = "conditioner.embedders.1.model.text_projection"


@pytest.mark.parametrize(
    ("spelling", "as_linear"),
    [(PROJECTION, False), (PROJECTION + ".weight", True), (PROJECTION + ".weight", False)],
)
def test_the_text_projections_shape_tells_its_orientation(tmp_path, spelling, as_linear):
    """Where it is not square: this model's is (24, 16) as OpenCLIP's parameter."""

    def respell(tensors):
        value = tensors.pop(PROJECTION)
        tensors[spelling] = (value.T if as_linear else value).contiguous()

    assert_same(load(edit_tensors(saved_model.single_file(), respell, tmp_path / "m.safetensors")))


@pytest.mark.parametrize("spelling", [PROJECTION, PROJECTION + ".weight"])
def test_a_square_text_projections_name_tells_its_orientation(tmp_path, spelling):
    value = torch.randn(16, 16)
    save_file({spelling: value}, tmp_path / "m.safetensors")
    encoder = nn.Module()
    encoder.text_projection = nn.Linear(16, 16, bias=False)
    encoder.text_model = nn.Module()
    encoder.text_model.final_layer_norm = nn.LayerNorm(16)
    place_projection(tmp_path / "m.safetensors", encoder, {spelling: (16, 16)})
    expected = value if spelling.endswith(".weight") else value.T
    assert torch.equal(encoder.text_projection.weight, expected)


SCALE_OF_A_VAE = "decoder.conv_in.scale_weight"


@pytest.mark.parametrize("whole", [True, False])
def test_a_vaes_scale_is_refused(tmp_path, whole):
    name = ("first_stage_model." if whole else "") + SCALE_OF_A_VAE
    tensors = load_file(saved_model.single_file()) if whole else vae_tensors(saved_model.pipeline().vae)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors | {name: torch.full((1,), 3.0)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=rf"x\.safetensors: weights with scales \({name}\)"):
        load_vae_file(tmp_path / "x.safetensors", saved_model.folder() / "vae")
    said = json.dumps({"layers": {name.removesuffix(".scale_weight"): {"format": "float8_e4m3fn"}}})
    save_file(tensors, tmp_path / "x.safetensors", metadata={"_quantization_metadata": said})
    with pytest.raises(InputError, match=r"weights with scales \(_quantization_metadata of [\w.]+conv_in\)"):
        load_vae_file(tmp_path / "x.safetensors", saved_model.folder() / "vae")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("name", ["decoder.more.weight", "decoder.up.0.block.9.conv1.weight"])
def test_a_vaes_tensor_that_no_layer_takes_is_warned_of(tmp_path, prefix, name):
    tensors = load_file(saved_model.single_file()) if prefix else vae_tensors(saved_model.pipeline().vae)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors | {prefix + "loss.logvar": torch.ones(1)}, tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_vae_file(tmp_path / "x.safetensors", saved_model.folder() / "vae")
    save_file(tensors | {prefix + name: torch.ones(4)}, tmp_path / "x.safetensors")
    with pytest.warns(
        UserWarning, match=f"1 tensors of no part of the VAE are not read, first {prefix}{name}"
    ):
        load_vae_file(tmp_path / "x.safetensors", saved_model.folder() / "vae")


def test_whole_numbers_without_a_scale_are_refused(tmp_path):
    def to_int8(tensors):
        tensors.update({k: v.to(torch.int8) for k, v in tensors.items() if k.endswith("attn1.to_q.weight")})

    path = edit_tensors(saved_model.single_file(), to_int8, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"attn1\.to_q\.weight is in whole numbers without a scale"):
        load(path)
    torch.save(load_file(path), tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"attn1\.to_q\.weight is in whole numbers without a scale"):
        load(tmp_path / "model.ckpt", allow_pickle=True)


def test_two_scales_of_a_layer_are_refused(tmp_path):
    both = {f"model.diffusion_model.out.2.{name}": torch.ones(1) for name in ("scale_weight", "weight_scale")}
    path = edit_tensors(saved_model.single_file(), lambda t: t.update(both), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"out\.2\.\w+: the layer has two scales"):
        load(path)
