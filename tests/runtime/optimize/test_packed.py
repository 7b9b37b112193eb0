"""Packed weights: the same pictures, in every size and layer, and nothing packed where it does not help."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from runtime import LocalControlPipeline
from runtime.machine.arithmetic import has_kernels
from runtime.model.blocks import GEGLU
from runtime.model.unet import UNet
from runtime.optimize.packed import (
    NarrowGroupNorm,
    Packed,
    PackedConv2d,
    PackedGEGLU,
    PackedLinear,
    has_one_layout,
    pack_weights,
    packs_here,
    unpack_weights,
)
from tests.support.tiny import make_pipeline
from tests.support.tolerances import assert_close, relative_rms

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not has_kernels(torch.bfloat16), reason="a CPU without bfloat16 arithmetic"),
    id="bf16",
)
both = pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), BF16])
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def tiny_unet(dtype, **config):
    config = {**make_pipeline().unet.config, **config}
    return UNet.from_diffusers(UNet2DConditionModel.from_config(config).to(dtype))


def channels_last(*shape, dtype):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 77, 4096])
@pytest.mark.parametrize("bias", [True, False])
@both
def test_a_linear_layer(rows, bias, dtype):
    layer = nn.Linear(48, 40, bias=bias, dtype=dtype)
    x = torch.randn(2, rows, 48, dtype=dtype)
    packed = PackedLinear(layer.weight, layer.bias)
    assert relative_rms(packed(x), layer(x)) < CLOSE[dtype] and packed(x).dtype == dtype


@torch.inference_mode()
@both
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
@pytest.mark.parametrize("size", [(8, 8), (17, 5), (1, 2)])
@both
def test_a_convolution(conv, size, dtype):
    conv = copy.deepcopy(conv).to(dtype, memory_format=torch.channels_last)
    x = channels_last(2, conv.in_channels, *size, dtype=dtype)
    made, expected = PackedConv2d(conv)(x), conv(x)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.shape == expected.shape
    assert relative_rms(made, expected) < CLOSE[dtype]


LAYERS = {  # a packed layer of float32, the plain one, and an input's shape
    "linear": lambda: (PackedLinear((layer := nn.Linear(48, 40)).weight, layer.bias), layer, (2, 7, 48)),
    "gate": lambda: (PackedGEGLU((layer := GEGLU(48, 96)).proj), layer, (2, 7, 48)),
    "convolution": lambda: (PackedConv2d(layer := nn.Conv2d(16, 24, 3, padding=1)), layer, (2, 16, 8, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_goes_through(name):
    """oneDNN's operators would cut it off with no more than a warning."""
    packed, plain, shape = LAYERS[name]()
    x = torch.randn(shape, requires_grad=True)
    weights = torch.randn_like(plain(x))
    made, expected = (torch.autograd.grad(layer(x), x, weights)[0] for layer in (packed, plain))
    assert_close("gradient", made, expected, "gradient")


@torch.inference_mode()
@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast(name):
    """What comes is of another dtype than the weights, which autocast does not know."""
    packed, plain, shape = LAYERS[name]()
    x = torch.randn(shape).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_rms(packed(x).float(), plain(x.float()).float()) < 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("size", [(4, 4), (31, 33), (32, 32), (32, 33)])
@both
def test_a_group_norm_of_narrow_groups(size, dtype):
    norm = nn.GroupNorm(8, 32, dtype=dtype)
    norm.weight.data.normal_(), norm.bias.data.normal_()
    x = channels_last(2, 32, *size, dtype=dtype)
    exact = copy.deepcopy(norm).double()(x.double())
    norm.__class__ = NarrowGroupNorm
    assert_close("norm", norm(x), exact)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
@pytest.mark.parametrize("linear", [True, False], ids=["linear projection", "convolution as projection"])
@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
@both
def test_a_whole_unet(linear, size, dtype):
    unet = tiny_unet(dtype, use_linear_projection=linear)
    given = torch.tensor([500.0]), torch.randn(2, 16), torch.randint(1, 99, (2, 6)).float()
    text, sample = torch.randn(2, 77, 32, dtype=dtype), torch.randn(2, 4, *size, dtype=dtype)

    def run(unet, dtype):
        time = [t[0] for t in unet.embed_time(*given)]
        return unet(sample.to(dtype), time, unet.project_text(text.to(dtype)))

    expected, kinds = run(copy.deepcopy(unet).double(), torch.float64), {type(m) for m in unet.modules()}
    made = run(pack_weights(unet), dtype)
    assert {nn.Linear, nn.Conv2d} <= kinds and nn.Linear not in {type(m) for m in unet.modules()}
    assert_close("prediction", made, expected, "unet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_is_packed_where_that_helps(dtype):
    pipe = LocalControlPipeline.from_pretrained("embedded", dtype=dtype)
    kinds = {type(m) for m in pipe.model.unet.modules()}
    assert ({PackedLinear, NarrowGroupNorm} <= kinds) == packs_here(dtype, CPU)
    assert pipe.dtype == dtype and pipe.device == CPU


def packed_pipeline(dtype):
    pipe = LocalControlPipeline.from_pretrained("embedded", dtype=dtype)
    pack_weights(pipe.model.unet)  # once more where it is already
    return pipe


@both
def test_a_copy_draws_the_same(dtype):
    pipe = packed_pipeline(dtype)
    call = {"prompt": "a red star", "steps": 2, "seed": 0}
    assert torch.equal(copy.deepcopy(pipe)(**call).latents, pipe(**call).latents)


@both
def test_a_pipeline_of_diffusers_keeps_its_weights(dtype):
    theirs = make_pipeline().to(dtype)
    ours = LocalControlPipeline.from_diffusers(theirs)
    assert ours.model.unet.conv_in.weight.data_ptr() == theirs.unet.conv_in.weight.data_ptr()


@both
def test_packed_weights_are_unpacked_to_be_compiled(dtype):
    pipe = packed_pipeline(dtype)
    call = {"prompt": "a red star", "steps": 2, "seed": 0}
    unpacked = copy.deepcopy(pipe)
    unpack_weights(unpacked.model.unet)
    expected = unpacked(**call).latents
    assert relative_rms(pipe.compile(compiler="eager")(**call).latents, expected) < CLOSE[dtype]
    assert not any(isinstance(m, (Packed, NarrowGroupNorm)) for m in pipe.model.unet.modules())


@both
def test_unpacked_weights_are_the_ones_that_were_packed(dtype):
    unet = tiny_unet(dtype)
    before, modules = copy.deepcopy(unet), {name: str(module) for name, module in unet.named_modules()}
    unpack_weights(pack_weights(unet))
    assert {name: str(module) for name, module in unet.named_modules()} == modules
    state = unet.state_dict()
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(state[name], value) for name, value in before.state_dict().items())


SIZES = [
    (1, 2, 2),
    (1, 8, 8),
    (2, 1, 1),
    (3, 5, 7),
    (1, 13, 19),
    (2, 26, 38),
    (16, 3, 4),
]  # rows, height, width


@torch.inference_mode()
@both
def test_no_weight_is_laid_out_anew_at_a_call(dtype, capfd):
    """Every convolution gets its weight as oneDNN wants it at that size, which oneDNN itself says."""
    unet = LocalControlPipeline.from_pretrained("embedded", dtype=dtype).model.unet
    convs = [m for m in pack_weights(unet).modules() if isinstance(m, PackedConv2d)]
    assert convs
    given = {
        conv: [channels_last(rows, conv.weight.shape[1], *sides, dtype=dtype) for rows, *sides in SIZES]
        for conv in convs
    }
    for conv, inputs in given.items():
        for x in inputs:
            conv(x)
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        for conv, inputs in given.items():
            for x in inputs:
                conv(x)
    said = capfd.readouterr().out.splitlines()
    assert sum(",exec,cpu,convolution," in line for line in said) == len(convs) * len(SIZES)
    assert not [line for line in said if ",reorder," in line]


def test_a_convolution_of_varying_layout_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("runtime.optimize.packed.has_one_layout", lambda conv: conv.kernel_size == (1, 1))
    assert isinstance(pack_weights(tiny_unet(torch.float32)).conv_in, nn.Conv2d)


def test_one_layout_is_asked_of_onednn(monkeypatch):
    conv, odd = nn.Conv2d(32, 48, 3, padding=1), (16, 128, 128)
    monkeypatch.setattr(
        "runtime.optimize.packed.layout_for", lambda *given: b"b" if given[-1] == odd else b"a"
    )
    assert not has_one_layout(conv)
