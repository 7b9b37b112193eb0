"""runtime.loading.controlnet: ControlNets from folders and files, found by their contents, and what is refused."""

import json
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionXLControlNetPipeline
from safetensors.torch import load_file, save_file

from runtime import LocalControlPipeline
from runtime.errors import InputError
from runtime.loading.controlnet import check_controlnet, control_of, load_controlnet
from runtime.loading.controls import load_controls
from runtime.loading.single_file import SDXL_CONFIGS
from runtime.model.config import ControlNetConfig, UNetConfig
from runtime.model.controlnet import ControlNet, ControlNetUnion
from tests.support.saved_model import edit_json, edit_tensors
from tests.support.single_file_layout import controlnet_tensors
from tests.support.tiny import make_adapter, make_controlnet, make_pipeline, make_union

K = "control_model"
TO_K = f"{K}.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
ON_CPU = {"device": "cpu", "dtype": torch.float32}


@cache
def unet():
    return make_pipeline().unet


@cache
def sdxl_like():
    """A ControlNet with what a file without a config is taken to have: SDXL's heads and widths of 64 and 256."""
    return make_controlnet(
        unet(),
        block_out_channels=(32, 64, 128),
        attention_head_dim=(1, 1, 2),
        norm_num_groups=32,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=16 + 6 * 256,
        layers_per_block=2,
    )


def load(source, name="depth", **options):
    return load_controlnet(source, name=name, **ON_CPU | options)


def assert_same(net, expected):
    theirs = expected.state_dict()
    assert net.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in net.state_dict().items())


@pytest.fixture
def folder(tmp_path):
    make_controlnet(unet()).save_pretrained(tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def weights(tmp_path):
    """A file in diffusers' layout."""
    save_file(sdxl_like().state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def original(tmp_path):
    """A file in the original layout."""
    save_file(controlnet_tensors(sdxl_like()), tmp_path / "control.safetensors")
    return tmp_path / "control.safetensors"


def test_a_folder(folder):
    assert_same(load(folder), make_controlnet(unet()))


@pytest.mark.parametrize("layout", ["weights", "original"])
def test_a_file(layout, request):
    net = load(request.getfixturevalue(layout))
    assert_same(net, sdxl_like())
    config = ControlNetConfig.from_diffusers(sdxl_like().config)
    assert net.config == replace(config, transformer_layers_per_block=(0, 1, 2))  # the first block has none
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.ndim == 4)


def test_a_file_of_the_original_layout_without_its_prefix(original):
    bare = edit_tensors(
        original,
        lambda tensors: [
            tensors.update({k.removeprefix("control_model."): tensors.pop(k)}) for k in list(tensors)
        ],
    )
    assert_same(load(bare), sdxl_like())


@pytest.mark.parametrize(
    "options",
    [
        {"transformer_layers_per_block": (0, 0, 1)},
        {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"},
    ],
    ids=["mid", "small"],
)
def test_smaller_ones(options, tmp_path):
    net = make_controlnet(unet(), **options)
    net.save_pretrained(tmp_path / "net")
    assert_same(load(tmp_path / "net"), net)
    if "mid_block_type" not in options:  # a file says all but the heads
        found = load(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
        assert found.config.transformer_layers_per_block == (0, 0, 1)


def test_a_union_under_the_names_of_its_controls(tmp_path):
    union = make_union(unet(), controls=8)
    union.save_pretrained(tmp_path / "union")
    names = {"canny": 3, "depth-2": 1, "tile": 6}
    adapters, nets = load_controls(dict.fromkeys(names, tmp_path / "union"), *ON_CPU.values())
    assert adapters == {} and {name: net.control for name, net in nets.items()} == names
    assert nets["canny"].conv_in is nets["tile"].conv_in  # read once
    file = load(tmp_path / "union" / "diffusion_pytorch_model.safetensors")
    assert isinstance(file, ControlNetUnion) and file.control == 1
    assert_same(file, union)


@pytest.mark.parametrize("name", ["mine", "repaint", "tile", None, "", "2"])
def test_another_name_does_not_say_which_control_of_a_union(name, tmp_path):
    make_union(unet()).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="a ControlNet-Union, of which the name says the control; expected one of open"
    ):
        load(tmp_path, name)


def test_controls_have_many_names():
    names = ("Depth", "depth_3", "depth2", "depth-left")
    assert [control_of(name, 8, "") for name in names] == [1] * 4
    assert [control_of(name, 8, "") for name in ("pose", "scribble", "lineart", "inpaint")] == [0, 2, 3, 7]


def test_each_source_is_what_its_contents_say(folder, original, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    sources = {
        "a": folder,
        "b": tmp_path / "adapter",
        "c": make_controlnet(unet()),
        "d": make_adapter(),
        "e": original,
    }
    adapters, nets = load_controls(sources, *ON_CPU.values())
    assert list(adapters) == ["b", "d"] and list(nets) == ["a", "c", "e"]
    assert all(isinstance(net, ControlNet) for net in nets.values())


def test_half_precision(folder):
    assert load(folder, dtype=torch.float16).conv_in.weight.dtype == torch.float16


def test_a_pickle_is_asked_for(folder):
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="a pickle"):
        load(folder)
    assert_same(load(folder, allow_pickle=True), make_controlnet(unet()))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"_class_name": "FluxControlNetModel"}, "a FluxControlNetModel; expected a ControlNet for SDXL"),
        ({"_class_name": "T2IAdapter"}, "a T2I-Adapter; expected a ControlNet for SDXL"),
        (
            {"addition_embed_type": None, "cross_attention_dim": 768},
            "a ControlNet for Stable Diffusion 1.5; expected",
        ),
        (
            {"addition_embed_type": None, "cross_attention_dim": 1024},
            "a ControlNet for Stable Diffusion 2; expected",
        ),
        ({"global_pool_conditions": True}, "global_pool_conditions = True is not supported, expected False"),
        ({"cross_attention_dim": 48}, "config.json's model expects"),
        ({"layers_per_block": 2}, "weights of config.json's model missing"),
        (
            {"layers_per_block": 1, "mid_block_type": "UNetMidBlock2D"},
            "weights unknown to config.json's model, first mid",
        ),
        ({"num_control_type": 8}, "num_control_type = 8 is not supported, expected no such option"),
        ({"_class_name": ["ControlNetModel"]}, "a ['ControlNetModel']; expected a ControlNet for SDXL"),
        ({"addition_embed_type": None, "cross_attention_dim": [768, 768]}, "a ControlNet for another model"),
        ({"freq_shift": "a"}, "freq_shift = 'a' is not supported, expected a number"),
        ({"flip_sin_to_cos": "x"}, "flip_sin_to_cos = 'x' is not supported, expected true or false"),
        ({"norm_eps": float("nan")}, "norm_eps = nan is not supported, expected a number from 0 to 1"),
        ({"attention_head_dim": [2, 5, 4]}, "expected numbers of heads that divide (32, 64, 64) channels"),
        ({"transformer_layers_per_block": [1, 1, 2**31]}, "expected 3 whole numbers from 0 to 100"),
    ],
)
def test_a_folder_of_another_kind(folder, values, expected):
    edit_json(folder / "config.json", **values)
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_union_whose_config_calls_it_a_controlnet(tmp_path):
    make_union(unet(), controls=8).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", _class_name="ControlNetModel")
    net = load(tmp_path, "canny")
    assert isinstance(net, ControlNetUnion) and net.control == 3
    edit_json(tmp_path / "config.json", num_trans_head=7)
    with pytest.raises(
        InputError, match="num_trans_head = 7 is not supported, expected heads that divide 32"
    ):
        load(tmp_path, "canny")


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (
            {"x": MultiControlNetModel([])},
            "adapter x: a MultiControlNetModel; expected a folder, a file, a hub id",
        ),
        ({"x": ["a", "b"]}, "adapter x: a list; expected a folder"),
        ({1: "a"}, "adapters: the name 1; expected a text"),
        ({"x": "a" * 5000}, "adapter x .*: File name too long; expected a folder, a file or a hub id"),
        ({"mine": make_union(make_pipeline().unet)}, "^adapter mine: a ControlNet-Union, of which"),
    ],
)
def test_what_is_no_adapter_is_refused_by_its_name(sources, expected):
    with pytest.raises(InputError, match=expected):
        load_controls(sources, *ON_CPU.values())


def test_a_pipeline_of_several_controlnets_wants_names():
    parts = make_pipeline().components
    nets = [make_controlnet(unet()), make_controlnet(unet(), seed=1)]
    pipe = StableDiffusionXLControlNetPipeline(**parts, controlnet=nets, add_watermarker=False)
    with pytest.raises(InputError, match="a MultiControlNetModel; name each: adapters="):
        LocalControlPipeline.from_diffusers(pipe)
    named = LocalControlPipeline.from_diffusers(pipe, {"a": nets[0], "b": nets[1]})
    assert list(named.controlnets) == ["a", "b"]


def drop(*names):
    return lambda tensors: [
        tensors.pop(name) for name in list(tensors) if any(part in name for part in names)
    ]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (drop("label_emb"), "a ControlNet for another model; expected a ControlNet for SDXL"),
        (drop("zero_convs.3"), "not a whole ControlNet: controlnet_down_blocks.3.bias is missing"),
        (lambda t: t.update({K + ".input_blocks.1.0.op.weight": torch.ones(1)}), "is not supported, ex"),
        (lambda t: t.update({K + ".input_blocks.0.0.op.weight": torch.ones(1)}), "not a whole ControlNet: integer"),
        (lambda t: t.update({TO_K: torch.ones(())}), "not a whole ControlNet"),
        (drop("middle_block_out"), "not a whole ControlNet: controlnet_mid_block.bias is missing"),
        (drop("input_hint_block"), "no ControlNet, its first tensor is"),
        (drop(".op."), "no input_blocks.N.0.op.weight in it"),
        (lambda t: t.update(scale=torch.ones(1)), "1 tensors without a place, first scale"),
        (lambda t: t.update({"lora_controlnet": torch.ones(1)}), "a Control-LoRA, which is not read"),
        (
            lambda t: t.update({"control_model.time_embed.0.bias": torch.ones(128).int()}),
            "time_embedding.linear_1.bias is torch.int32; expected floating-point numbers",
        ),
        (
            lambda t: t["control_model.time_embed.0.bias"].fill_(float("nan")),
            "NaN or infinity in the weights, first in controlnet time_embedding.linear_1.bias",
        ),
    ],
)  # fmt: skip
def test_a_file_of_another_kind(original, edit, expected):
    edit_tensors(original, edit)
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        load(original)
    assert "\n" not in str(caught.value) and str(original) in str(caught.value)


def test_a_truncated_file(weights):
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"not a whole \.safetensors file"):
        load(weights)


def test_an_adapter_where_a_controlnet_is_expected(tmp_path):
    make_adapter().save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(InputError, match="a T2I-Adapter.*; expected a ControlNet for SDXL"):
            load(source)


def test_what_a_file_does_not_say_must_be_the_unets(weights):
    net = load(weights)
    theirs = {
        key: getattr(net.config, key) for key in UNetConfig.__dataclass_fields__ if hasattr(net.config, key)
    }
    config = UNetConfig(**theirs, out_channels=4, up_block_types=())
    check_controlnet("depth", net, config, 8)
    other = UNetConfig(**theirs | {"attention_head_dim": (2, 2, 2)}, out_channels=4, up_block_types=())
    with pytest.raises(InputError, match="'depth': a ControlNet with attention_head_dim .*, the UNet has"):
        check_controlnet("depth", net, other, 8)
    other = UNetConfig(**theirs | {"addition_time_embed_dim": 128}, out_channels=4, up_block_types=())
    with pytest.raises(
        InputError, match="'depth': a ControlNet with addition_time_embed_dim 256, the UNet has 128"
    ):
        check_controlnet("depth", net, other, 8)
    with pytest.raises(InputError, match="'depth': a ControlNet reads latents of 8 pixels, the VAE's have 4"):
        check_controlnet("depth", net, config, 4)


def test_engines_take_none(folder, tmp_path):
    from tests.support import engines

    with pytest.raises(InputError, match="adapter depth: a ControlNet, which a compiled UNet does not take"):
        LocalControlPipeline.from_engine(engines.folder("onnxruntime"), {"depth": folder})


def test_sdxl_at_full_size_in_shapes():
    """SDXL's ControlNet as published, on the meta device: parameters, residuals, and that it fits SDXL's UNet."""
    config = json.loads((SDXL_CONFIGS / "unet" / "config.json").read_text())
    keys = ControlNetConfig.__dataclass_fields__.keys() | {"addition_embed_type"}
    with torch.device("meta"):
        theirs = ControlNetModel(**{k: v for k, v in config.items() if k in keys and k != "mid_block_type"})
        net = ControlNet(ControlNetConfig.from_diffusers(theirs.config))
        assert {k: v.shape for k, v in net.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        assert sum(p.numel() for p in net.parameters()) == 1_251_014_160
        check_controlnet("depth", net, UNetConfig.from_diffusers(config), 8)
        time = net.embed_time(torch.empty(1), torch.empty(2, 1280), torch.empty(2, 6))
        text = net.project_text(torch.empty(2, 77, 2048))
        condition = net.embed_condition(torch.empty(1, 3, 1024, 1024))
        found = net(torch.empty(2, 4, 128, 128), [t[0] for t in time], text, condition)
    wide = [(320, 128)] * 3 + [(320, 64)] + [(640, 64)] * 2 + [(640, 32)] + [(1280, 32)] * 3
    assert [tuple(r.shape) for r in found] == [(2, c, side, side) for c, side in wide]


@pytest.mark.parametrize("layout", ["weights", "original"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "controlnet."])
def test_a_wrapped_models_prefix_is_left_out(layout, prefix, request):
    path = request.getfixturevalue(layout)
    save_file({prefix + key: value for key, value in load_file(path).items()}, path)
    assert_same(load(path), sdxl_like())
