"""runtime.specialize: which layers are exchanged where."""

import pytest
import torch
from torch import nn

from runtime.fp8 import Fp8Linear
from runtime.fused import FusedGroupNormSiLU
from runtime.loading import from_diffusers
from runtime.packed import PackedLinear, packs_here
from runtime.specialize import specialize
from tests.tiny import make_pipeline

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the latter by name only: nothing is put there


@pytest.mark.parametrize(
    ("device", "dtype", "backend", "quantize", "linear", "norm"),
    [
        (CPU, torch.float32, "auto", None, nn.Linear, nn.GroupNorm),
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


@pytest.mark.skipif(not packs_here(torch.bfloat16, CPU), reason="a CPU without bfloat16 arithmetic")
def test_a_cpu_with_bfloat16_gets_packed_weights():
    model = from_diffusers(make_pipeline().to(torch.bfloat16))
    specialize(model, CPU, torch.bfloat16, "auto")
    assert type(model.unet.down_blocks[1].attentions[0].proj_in) is PackedLinear
