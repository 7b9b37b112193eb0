"""A residual block whose biases are moved computes what it computed before, and its convolutions add none."""

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import ops
from runtime.loading.load import from_diffusers
from runtime.optimize.exchange import exchange
from runtime.optimize.fp8 import quantize
from runtime.optimize.fused import FusedGroupNormSiLU, fuse_unet, fuse_vae
from runtime.optimize.fused_resnet import FusedResnet, FusedVaeResnet, fuse_resnet
from tests.support.interpreter import BACKENDS
from tests.support.tiny import make_pipeline
from tests.support.tolerances import assert_close


def loud(model: nn.Module) -> nn.Module:
    """Give every bias a value that is seen where it is left out."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_the_unet(backend):
    """With a shortcut and without, x in either memory format: its result, and the gradient of its input."""
    unet = loud(from_diffusers(make_pipeline()).unet)
    names, plain = list(unet.state_dict()), copy.deepcopy(unet).resnets()
    fused = fuse_unet(unet).resnets()
    assert list(unet.state_dict()) == names
    assert {type(r.conv_shortcut) for r in plain} == {nn.Identity, nn.Conv2d}
    for before, after in zip(plain, fused, strict=True):
        assert type(after) is FusedResnet
        embedding = torch.randn(2, before.time_emb_proj.in_features)
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(2, before.conv1.in_channels, 5, 6).to(memory_format=layout).requires_grad_()
            with ops.use_backend(backend):
                made = after(x, after.project_time(embedding))
                weights = torch.randn_like(made)
                gradient = torch.autograd.grad(made, x, weights)[0]
                with torch.no_grad():
                    given = x.clone()
                    assert_close("in place", after(given, after.project_time(embedding)), made, "unet")
                assert torch.equal(given, x)
            expected = before(x, before.project_time(embedding))
            assert_close("result", made, expected, "unet")
            assert_close("gradient", gradient, torch.autograd.grad(expected, x, weights)[0], "unet")


@torch.inference_mode()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vae(backend):
    vae = loud(make_pipeline().vae)
    latents, pixels = torch.randn(1, 4, 4, 6), torch.rand(1, 3, 32, 48)
    expected = vae.decode(latents).sample, vae.encode(pixels).latent_dist.mean
    with ops.use_backend(backend):
        made = fuse_vae(vae).decode(latents).sample, vae.encode(pixels).latent_dist.mean
    assert any(type(m) is FusedVaeResnet for m in vae.modules())
    assert_close("pixels", made[0], expected[0], "unet")
    assert_close("latents", made[1], expected[1], "unet")


def test_a_block_whose_output_is_scaled():
    block = loud(
        ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=None, groups=4, output_scale_factor=2)
    )
    x = torch.randn(1, 8, 3, 5)
    expected = block(x, None)
    exchange(block.norm1, FusedGroupNormSiLU)
    exchange(block.norm2, FusedGroupNormSiLU)
    fuse_resnet(block)
    assert_close("result", block(x, None), expected, "unet")


def test_moved_biases_follow_the_model():
    unet = fuse_unet(from_diffusers(make_pipeline()).unet)
    both = [
        r.conv_shortcut.both for r in unet.to(torch.bfloat16).resnets() if hasattr(r.conv_shortcut, "both")
    ]
    assert both and {b.dtype for b in both} == {torch.bfloat16}


def test_other_weights_are_used_whole():
    """Weights that are loaded into a fused model, or into the diffusers model that it shares them with."""
    pipe, vae = make_pipeline(), make_pipeline().vae
    unet, fused = from_diffusers(pipe).unet, fuse_vae(copy.deepcopy(vae))
    before = predict(fuse_unet(unet))
    pipe.unet.load_state_dict(loud(copy.deepcopy(pipe.unet)).state_dict())
    fused.load_state_dict(loud(vae).state_dict())
    made = predict(unet)
    assert not torch.allclose(made, before)
    assert_close("shared with diffusers", made, predict(from_diffusers(pipe).unet), "unet")
    latents = torch.randn(1, 4, 4, 6)
    assert_close("vae", fused.decode(latents).sample, vae.decode(latents).sample, "unet")


def test_biases_of_a_fused_model_still_learn():
    unet = loud(from_diffusers(make_pipeline()).unet).requires_grad_()
    grads = []
    for model in (copy.deepcopy(unet), fuse_unet(unet)):
        time = torch.ones(2, model.resnets()[0].time_emb_proj.in_features)
        for resnet in model.resnets():
            x = torch.linspace(-1, 2, 2 * resnet.conv1.in_channels * 12).view(2, -1, 3, 4)
            resnet(x, resnet.project_time(time)).square().sum().backward()
        biases = {n: p for n, p in model.named_parameters() if "resnets" in n and n.endswith("bias")}
        assert all(bias.grad is not None for bias in biases.values())
        grads.append(biases)
    for name, bias in grads[1].items():
        assert_close(name, bias.grad, grads[0][name].grad, "gradient")


def test_fusing_again_changes_nothing():
    """A trainer fuses what a pipeline has fused already."""
    unet = loud(from_diffusers(make_pipeline()).unet)
    expected = predict(unet)
    for _ in range(2):
        assert_close("prediction", predict(fuse_unet(unet)), expected, "unet")


@torch.no_grad()
def predict(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, pooled, text = (torch.randn(n, generator=generator) for n in ((2, 4, 8, 6), (2, 16), (2, 77, 32)))
    time = [t[0] for t in unet.embed_time(torch.tensor([500.0]), pooled, torch.ones(2, 6))]
    return unet(sample, time, unet.project_text(text))


def test_a_unet_whose_weights_are_in_float8_stays_as_it_is():
    """Its convolutions are layers of another kind."""
    unet = quantize(loud(from_diffusers(make_pipeline()).unet), "fp8-weights")
    expected = predict(unet)
    assert_close("prediction", predict(fuse_unet(unet)), expected, "unet")
    assert not any(isinstance(m, FusedResnet) for m in unet.modules())


class Biased(TorchDispatchMode):
    """Counts the convolutions that add a bias."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.name == "aten::convolution":
            self.count += args[2] is not None
        return operation(*args, **(kwargs or {}))


def test_few_convolutions_are_left_with_a_bias():
    """Those of blocks that keep their channels, and those that are in no block."""
    unet = fuse_unet(from_diffusers(make_pipeline()).unet)
    with Biased() as biased:
        predict(unet)
    convolutions = [m for m in unet.modules() if isinstance(m, nn.Conv2d)]
    outside = len(convolutions) - sum(isinstance(m, nn.Conv2d) for r in unet.resnets() for m in r.modules())
    assert biased.count == outside + sum(isinstance(r.conv_shortcut, nn.Identity) for r in unet.resnets())
