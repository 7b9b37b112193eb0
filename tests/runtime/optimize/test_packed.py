"""Packed weights: the same pictures, in every size and layer, and nothing packed where it does not help."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from runtime import LocalControlPipeline
from runtime.model.blocks import GEGLU
from runtime.model.unet import UNet
from runtime.optimize.packed import (
    NarrowGroupNorm,
    Packed,
    PackedConv2d,
    PackedGEGLU,
    PackedLinear,
    has_one_layout,
    layout,
    pack_weights,
    packs_here,
    reordered,
    unpack_weights,
)
from tests.support.tiny import make_pipeline
from tests.support.tolerances import assert_close, relative_rms

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not packs_here(torch.bfloat16, CPU), reason="a CPU without bfloat16 arithmetic"
)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 77, 4096])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(rows, bias):
    layer = nn.Linear(48, 40, bias=bias).bfloat16()
    x = torch.randn(2, rows, 48).bfloat16()
    packed = PackedLinear(layer.weight, layer.bias)
    assert relative_rms(packed(x), layer(x)) < 1e-2 and packed(x).dtype == torch.bfloat16


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate(dtype):
    geglu, x = GEGLU(48, 96).to(dtype), torch.randn(2, 77, 48, dtype=dtype)
    exact = copy.deepcopy(geglu).double()(x.double())
    assert_close("gated", PackedGEGLU(geglu.proj)(x), exact)


@torch.inference_mode()
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(32, 48, 3, padding=1),
        nn.Conv2d(32, 32, 3, 2, 1),
        nn.Conv2d(4, 32, 3, padding=1),
        nn.Conv2d(32, 8, 1),
    ],
    ids=["3x3", "stride 2", "4 channels", "1x1"],
)
@pytest.mark.parametrize("size", [(8, 8), (17, 5)])
def test_a_convolution(conv, size):
    conv = conv.bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(2, conv.in_channels, *size).bfloat16().to(memory_format=torch.channels_last)
    made, expected = PackedConv2d(conv)(x), conv(x)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.shape == expected.shape
    assert relative_rms(made, expected) < 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("size", [(4, 4), (31, 33), (32, 32), (32, 33)])
def test_a_group_norm_of_narrow_groups(size):
    norm = nn.GroupNorm(8, 32).bfloat16()
    norm.weight.data.normal_(), norm.bias.data.normal_()
    x = torch.randn(2, 32, *size).bfloat16().to(memory_format=torch.channels_last)
    exact = copy.deepcopy(norm).double()(x.double())
    norm.__class__ = NarrowGroupNorm
    assert_close("norm", norm(x), exact)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
@pytest.mark.parametrize("linear", [True, False], ids=["linear projection", "convolution as projection"])
@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_a_whole_unet(linear, size):
    config = {**make_pipeline().unet.config, "use_linear_projection": linear}
    unet = UNet.from_diffusers(UNet2DConditionModel.from_config(config).bfloat16())
    given = torch.tensor([500.0]), torch.randn(2, 16), torch.randint(1, 99, (2, 6)).float()
    text, sample = torch.randn(2, 77, 32).bfloat16(), torch.randn(2, 4, *size).bfloat16()

    def run(unet, dtype):
        time = [t[0] for t in unet.embed_time(*given)]
        return unet(sample.to(dtype), time, unet.project_text(text.to(dtype)))

    expected, kinds = run(copy.deepcopy(unet).double(), torch.float64), {type(m) for m in unet.modules()}
    made = run(pack_weights(unet), torch.bfloat16)
    assert {nn.Linear, nn.Conv2d} <= kinds and nn.Linear not in {type(m) for m in unet.modules()}
    assert_close("prediction", made, expected, "unet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_is_packed_where_that_helps(dtype):
    pipe = LocalControlPipeline.from_pretrained("embedded", dtype=dtype)
    kinds = {type(m) for m in pipe.model.unet.modules()}
    assert ({PackedLinear, NarrowGroupNorm} <= kinds) == packs_here(dtype, CPU)
    assert pipe.dtype == dtype and pipe.device == CPU


def test_a_copy_draws_the_same():
    pipe = LocalControlPipeline.from_pretrained("embedded", dtype="bf16")
    call = {"prompt": "a red star", "steps": 2, "seed": 0}
    assert torch.equal(copy.deepcopy(pipe)(**call).latents, pipe(**call).latents)


def test_a_pipeline_of_diffusers_keeps_its_weights():
    theirs = make_pipeline().to(torch.bfloat16)
    ours = LocalControlPipeline.from_diffusers(theirs)
    assert ours.model.unet.conv_in.weight.data_ptr() == theirs.unet.conv_in.weight.data_ptr()


def test_packed_weights_are_unpacked_to_be_compiled():
    pipe = LocalControlPipeline.from_pretrained("embedded", dtype="bf16")
    call = {"prompt": "a red star", "steps": 2, "seed": 0}
    unpacked = copy.deepcopy(pipe)
    unpack_weights(unpacked.model.unet)
    expected = unpacked(**call).latents
    assert relative_rms(pipe.compile(compiler="eager")(**call).latents, expected) < 1e-2
    assert not any(isinstance(m, (Packed, NarrowGroupNorm)) for m in pipe.model.unet.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_weights_are_the_ones_that_were_packed(dtype):
    unet = UNet.from_diffusers(make_pipeline().unet.to(dtype))
    before, modules = copy.deepcopy(unet), {name: str(module) for name, module in unet.named_modules()}
    unpack_weights(pack_weights(unet))
    assert {name: str(module) for name, module in unet.named_modules()} == modules
    state = unet.state_dict()
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(state[name], value) for name, value in before.state_dict().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_packed_weight_is_laid_out_anew_at_another_size(dtype):
    unet = LocalControlPipeline.from_pretrained("embedded", dtype=dtype).model.unet
    for conv in (m for m in pack_weights(unet).modules() if isinstance(m, PackedConv2d)):
        plain = conv.plain().weight
        for size in conv.SIZES:
            assert layout(reordered(plain, *conv.shape, size)) == layout(conv.weight)


def test_a_convolution_of_varying_layout_stays_as_it_is(monkeypatch):
    unet = UNet.from_diffusers(make_pipeline().unet.bfloat16())
    monkeypatch.setattr("runtime.optimize.packed.has_one_layout", lambda conv: conv.kernel_size == (1, 1))
    assert isinstance(pack_weights(unet).conv_in, nn.Conv2d)


def test_one_layout_is_asked_of_onednn(monkeypatch):
    conv = nn.Conv2d(32, 48, 3, padding=1).bfloat16()
    seen = iter(range(100))
    monkeypatch.setattr("runtime.optimize.packed.layout", lambda weight: bytes([next(seen)]))
    has_one_layout.__globals__["_has_one_layout"].cache_clear()
    assert not has_one_layout(conv)
    has_one_layout.__globals__["_has_one_layout"].cache_clear()
