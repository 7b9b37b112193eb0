"""A UNet and a VAE on `kernels.ops` compute what they computed before: by the reference, and by the kernels."""

from unittest import mock

import pytest
import torch
from torch import nn

from kernels import ops
from runtime import LocalControlPipeline, Region
from runtime.loading.load import from_diffusers
from runtime.model.blocks import TransformerBlock
from runtime.optimize.fp8 import multiplies_here, quantize
from runtime.optimize.fused import FusedGEGLU, FusedGroupNormSiLU, fuse_unet, fuse_vae, fuses_here
from runtime.optimize.fused_qkv import fuse_qkv
from tests.support.interpreter import BACKENDS
from tests.support.tiny import make_adapter, make_pipeline
from tests.support.tolerances import assert_close, relative_rms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run(unet, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    ids = torch.ones(2, 6, device=device)
    time = [t[0] for t in unet.embed_time(torch.tensor([500.0], device=device), random(2, 16), ids)]
    return unet(random(2, 4, 8, 6), time, unet.project_text(random(2, 77, 32)))


@torch.inference_mode()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_unet(backend):
    unet = from_diffusers(make_pipeline()).unet
    expected, names = run(unet), list(unet.state_dict())
    with ops.use_backend(backend):
        assert_close("prediction", run(fuse_unet(unet)), expected, "unet")
    kinds = [type(m) for m in unet.modules()]
    assert FusedGroupNormSiLU in kinds and FusedGEGLU in kinds
    assert nn.GroupNorm not in kinds and list(unet.state_dict()) == names


@torch.inference_mode()
def test_layers_whose_weights_hooks_bring_are_called():
    """Offloading layer by layer brings a weight when its layer is called: one that is read beside that stays away."""
    unet, called = fuse_unet(fuse_qkv(from_diffusers(make_pipeline()).unet)), set()
    norms = [m for m in unet.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
    for module in norms:
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    run(unet)
    assert len(norms) > 20 and called == set(norms)


@torch.inference_mode()
@pytest.mark.skipif(not multiplies_here(torch.device("cpu")), reason="no float8 product on a CPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_goes_into_a_float8_product_is_made_in_float8(backend):
    """The three norms and the gate of a block; attentions' outputs and a transformer's own projections are turned."""
    unet = fuse_qkv(from_diffusers(make_pipeline().to(torch.bfloat16)).unet)
    exact = run(unet, dtype=torch.bfloat16)
    quantize(unet, "fp8")
    blocks = sum(isinstance(m, TransformerBlock) for m in unet.modules())
    with ops.use_backend(backend):
        plain, before = counted(unet)
        fused, after = counted(fuse_unet(unet))
    assert before - after == 4 * blocks > 0
    assert relative_rms(fused, exact) < 1.2 * relative_rms(plain, exact)


def counted(unet):
    """What it predicts, and how many inputs of products were turned to float8 apart."""
    with mock.patch.object(ops, "float8_rows", wraps=ops.float8_rows) as turned:
        return run(unet, dtype=torch.bfloat16), turned.call_count


@torch.inference_mode()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vae(backend):
    vae = make_pipeline().vae
    latents, pixels, names = torch.randn(1, 4, 4, 6), torch.rand(1, 3, 32, 48), list(vae.state_dict())
    expected = vae.decode(latents).sample, vae.encode(pixels).latent_dist.mean
    with ops.use_backend(backend):
        made = fuse_vae(vae).decode(latents).sample, vae.encode(pixels).latent_dist.mean
    assert_close("pixels", made[0], expected[0], "unet")
    assert_close("latents", made[1], expected[1], "unet")
    assert list(vae.state_dict()) == names


def test_where_kernels_run():
    assert fuses_here("auto", torch.device("cuda")) and fuses_here("triton", torch.device("cpu"))
    assert not fuses_here("auto", torch.device("cpu")) and not fuses_here("torch", torch.device("cuda"))


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_unet_on_a_gpu(dtype):
    unet = from_diffusers(make_pipeline().to("cuda", torch.float32)).unet
    expected = run(unet, "cuda")
    assert_close("prediction", run(fuse_unet(unet.to(dtype)), "cuda", dtype), expected, "unet")


@pytest.mark.gpu
def test_a_pipeline_on_a_gpu_is_fused_and_draws_the_same():
    condition = (torch.rand(1, 1, 64, 64) > 0.8).float()
    drawn = []
    for backend in ("torch", "auto"):
        pipe = LocalControlPipeline.from_diffusers(
            make_pipeline().to("cuda"), {"canny": make_adapter()}, backend
        )
        drawn.append(pipe("a star", [Region(condition)], steps=4, seed=0).latents)
    assert relative_rms(drawn[1], drawn[0]) < 1e-3
