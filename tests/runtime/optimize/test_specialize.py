"""runtime.optimize.specialize: which layers are exchanged where."""

import pytest
import torch
from torch import nn

from runtime.loading.load import from_diffusers
from runtime.optimize.fp8 import Fp8Linear
from runtime.optimize.fused import FusedGroupNormSiLU
from runtime.optimize.packed import PackedLinear, packs_here
from runtime.optimize.specialize import specialize
from tests.support.tiny import make_pipeline

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the latter by name only: nothing is put there


@pytest.mark.parametrize(
    ("device", "dtype", "backend", "quantize", "linear", "norm"),
    [
        (CPU, torch.float16, "auto", None, nn.Linear, nn.GroupNorm),
        (CUDA, torch.bfloat16, "auto", None, nn.Linear, FusedGroupNormSiLU),
        (CUDA, torch.bfloat16, "torch", None, nn.Linear, nn.GroupNorm),
        (CUDA, torch.bfloat16, "auto", "fp8", Fp8Linear, FusedGroupNormSiLU),
        (CPU, torch.bfloat16, "auto", "fp8", Fp8Linear, nn.GroupNorm),
    ],
)
def test_layers(device, dtype, backend, quantize, linear, norm):
    model = from_diffusers(make_pipeline().to(dtype))
    specialize(model, device, dtype, backend, quantize)
    block = model.unet.down_blocks[1]
    assert type(block.attentions[0].transformer_blocks[0].attn1.to_qkv) is linear
    assert type(block.resnets[0].norm1) is norm
    assert type(model.vae.decoder.conv_norm_out) is norm
    assert model.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_packed_where_that_helps(dtype):
    model = from_diffusers(make_pipeline().to(dtype))
    specialize(model, CPU, dtype, "auto")
    packed = type(model.unet.down_blocks[1].attentions[0].proj_in) is PackedLinear
    assert packed == packs_here(dtype, CPU)


@pytest.mark.parametrize(
    ("vendor", "mkl", "slow"),
    [
        ("AuthenticAMD", True, True),
        ("HygonGenuine", True, True),
        ("GenuineIntel", True, False),
        ("AuthenticAMD", False, False),
        ("", True, False),
    ],
)
def test_float32_is_packed_where_mkl_is_slow(monkeypatch, vendor, mkl, slow):
    """By the CPU's maker: by time, a busy machine would change the last bits of pictures."""
    monkeypatch.setattr("runtime.optimize.packed.cpu_vendor", lambda: vendor)
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: mkl)
    packs_here.cache_clear()
    assert packs_here(torch.float32, CPU) is slow
    packs_here.cache_clear()
    assert not packs_here(torch.float16, CPU) and not packs_here(torch.float32, torch.device("cuda"))
