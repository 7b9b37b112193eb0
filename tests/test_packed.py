"""Packed weights: the same pictures, in every size and layer, and nothing packed where it does not help."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from runtime import LocalControlPipeline
from runtime.errors import InputError
from runtime.packed import NarrowGroupNorm, PackedConv2d, PackedLinear, is_packed, pack_weights, packs_here
from runtime.unet import UNet
from tests.tiny import make_pipeline
from tests.tolerances import assert_close, relative_rms

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

    def run():
        time = [t[0] for t in unet.embed_time(*given)]
        return unet(sample, time, unet.project_text(text))

    expected, kinds = run(), {type(m) for m in unet.modules()}
    made = pack_weights(unet) and run()
    assert {nn.Linear, nn.Conv2d} <= kinds and not {nn.Linear, nn.Conv2d} & {type(m) for m in unet.modules()}
    assert relative_rms(made, expected) < 1e-2


def test_a_pipeline_in_bf16_is_packed_and_one_in_fp32_is_not():
    packed = LocalControlPipeline.from_pretrained("embedded", dtype="bf16")
    plain = LocalControlPipeline.from_pretrained("embedded", dtype="fp32")
    assert isinstance(packed.model.unet.conv_in, PackedConv2d) and isinstance(
        plain.model.unet.conv_in, nn.Conv2d
    )
    assert packed.dtype == torch.bfloat16 and packed.device == CPU
    assert isinstance(packed.model.unet.conv_norm_out, NarrowGroupNorm)


def test_a_copy_draws_the_same():
    pipe = LocalControlPipeline.from_pretrained("embedded", dtype="bf16")
    call = {"prompt": "a red star", "steps": 2, "seed": 0}
    assert torch.equal(copy.deepcopy(pipe)(**call).latents, pipe(**call).latents)


def test_a_pipeline_of_diffusers_keeps_its_weights():
    theirs = make_pipeline().to(torch.bfloat16)
    ours = LocalControlPipeline.from_diffusers(theirs)
    assert ours.model.unet.conv_in.weight.data_ptr() == theirs.unet.conv_in.weight.data_ptr()


def test_packed_weights_are_not_compiled():
    packed = LocalControlPipeline.from_pretrained("embedded", dtype="bf16")
    with pytest.raises(
        InputError, match=r"compile: the UNet's weights are packed; expected .*pack_weights=False"
    ):
        packed.compile()
    plain = LocalControlPipeline.from_pretrained("embedded", dtype="bf16", pack_weights=False)
    assert not is_packed(plain.model.unet) and plain.compile(compiler="eager")
