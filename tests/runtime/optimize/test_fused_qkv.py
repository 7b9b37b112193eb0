"""Self-attention with one projection: the same values, in plain layers and packed ones."""

import pytest
import torch
from torch import nn

from runtime.loading.load import from_diffusers
from runtime.model.blocks import Attention, TransformerBlock
from runtime.optimize.fused_qkv import FusedSelfAttention, fuse_qkv
from runtime.optimize.packed import PackedLinear, pack_weights, packs_here
from tests.support.tiny import make_pipeline
from tests.support.tolerances import assert_close, relative_rms


def run(unet, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    time = [t[0] for t in unet.embed_time(torch.tensor([500.0]), random(2, 16), torch.ones(2, 6))]
    return unet(random(2, 4, 8, 6), time, unet.project_text(random(2, 77, 32)))


@torch.inference_mode()
def test_a_unet_computes_the_same():
    unet = from_diffusers(make_pipeline()).unet
    expected, count = run(unet), sum(p.numel() for p in unet.parameters())
    assert_close("prediction", run(fuse_qkv(unet)), expected, "unet")
    assert sum(p.numel() for p in unet.parameters()) == count
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            assert type(block.attn1) is FusedSelfAttention and type(block.attn2) is Attention
            names = {name for name, _ in block.attn1.named_children()}
            assert names == {"to_qkv", "to_out"} and type(block.attn1.to_qkv) is nn.Linear


@pytest.mark.skipif(not packs_here(torch.bfloat16, torch.device("cpu")), reason="no bfloat16 arithmetic")
@torch.inference_mode()
def test_packed_it_is_still_one_product():
    unet = from_diffusers(make_pipeline().to(torch.bfloat16)).unet
    expected = run(unet, torch.bfloat16)
    pack_weights(fuse_qkv(unet))
    assert relative_rms(run(unet, torch.bfloat16), expected) < 2e-2
    packed = [m for m in unet.modules() if isinstance(m, FusedSelfAttention)]
    assert packed and all(type(m.to_qkv) is PackedLinear for m in packed)


def test_a_pipeline_of_diffusers_keeps_its_layers():
    theirs = make_pipeline()
    fuse_qkv(from_diffusers(theirs).unet)
    assert theirs.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight.numel()
