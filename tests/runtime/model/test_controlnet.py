"""runtime.model.controlnet against diffusers' ControlNetModel and ControlNetUnionModel."""

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from runtime.errors import InputError
from runtime.model.blocks import Injection
from runtime.model.config import ControlNetConfig
from runtime.model.controlnet import ControlNet, ControlNetUnion
from runtime.optimize.fused import fuse_encoder
from runtime.optimize.fused_qkv import fuse_qkv
from runtime.optimize.packed import pack_weights
from tests.runtime.model import test_unet as unets
from tests.support.tiny import randomized
from tests.support.tolerances import assert_close

HEIGHT, WIDTH = 9, 16  # of the latents
NAME = "two layers, odd height"
OPTIONS = {
    key: value for key, value in unets.CASES[NAME][0].items() if key not in ("up_block_types", "out_channels")
} | {"conditioning_embedding_out_channels": (4, 8, 8, 12)}
# As diffusers' "mid" and "small" ControlNets of SDXL have it: transformers without blocks, and none at all
KINDS = {
    "as the UNet": {},
    "bgr": {"controlnet_conditioning_channel_order": "bgr"},
    "few transformer blocks": {"transformer_layers_per_block": (0, 0, 1)},
    "without attention": {
        "down_block_types": ("DownBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2D",
    },
}
UNION = {"num_control_type": 8, "num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}


def build(**options):
    torch.manual_seed(0)
    return randomized(ControlNetModel(**OPTIONS | options))


def build_union(layers=2):
    torch.manual_seed(0)
    return randomized(ControlNetUnionModel(**OPTIONS | UNION | {"num_trans_layer": layers}))


def inputs(batch):
    condition = torch.rand(1, 3, 8 * HEIGHT, 8 * WIDTH, generator=torch.Generator().manual_seed(5))
    return unets.inputs(NAME, batch) | {"condition": condition}


def run_diffusers(net, x, **more):
    added = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]}
    call = {"added_cond_kwargs": added, "return_dict": False} | more
    condition = x["condition"].repeat(len(x["sample"]), 1, 1, 1)
    condition = [condition] if more else condition
    found, mid = net(x["sample"], x["timesteps"], x["text"], condition, **call)
    return [*found, mid]


def arguments(net, x):
    time = [projection[0] for projection in net.embed_time(x["timesteps"], x["pooled"], x["time_ids"])]
    return x["sample"], time, net.project_text(x["text"]), net.embed_condition(x["condition"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_equals_diffusers(kind, batch):
    reference, x = build(**KINDS[kind]), inputs(batch)
    ours = ControlNet.from_diffusers(reference)
    found, expected = ours(*arguments(ours, x)), run_diffusers(reference, x)
    assert len(found) == len(expected) == 9 + 1
    for i, (residual, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"residual {i}", residual, theirs, "unet")
    shallow = ours.forward_shallow(*arguments(ours, x))
    assert len(shallow) == 3 and all(map(torch.equal, shallow, found))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("batch", "control"), [(1, 0), (2, 3), (4, 7)])
@torch.no_grad()
def test_a_union_equals_diffusers(layers, batch, control):
    reference, x = build_union(layers), inputs(batch)
    ours = ControlNet.from_diffusers(reference, control)
    kinds = torch.zeros(batch, UNION["num_control_type"])
    kinds[:, control] = 1
    expected = run_diffusers(reference, x, control_type=kinds, control_type_idx=[control])
    for i, (found, theirs) in enumerate(zip(ours(*arguments(ours, x)), expected, strict=True)):
        assert_close(f"residual {i}", found, theirs, "unet")
    other = ControlNet.from_diffusers(reference, 5)
    assert not torch.equal(other(*arguments(other, x))[0], expected[0])


@torch.no_grad()
def test_a_union_takes_each_condition_by_itself():
    net = ControlNet.from_diffusers(build_union(), 1)
    both = torch.rand(2, 3, 8 * HEIGHT, 8 * WIDTH)
    alone = [net.embed_condition(condition[None]) for condition in both]
    assert_close("embedded", net.embed_condition(both), torch.cat(alone), "unet")


@torch.no_grad()
def test_the_unet_takes_its_residuals_as_diffusers_does():
    reference, ours = unets.build(NAME)
    theirs, x = build(), inputs(2)
    net = ControlNet.from_diffusers(theirs)
    *down, mid = run_diffusers(theirs, x)
    control = unets.make_control(NAME, 1)
    added = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]}
    one = torch.ones(1)
    for features in (None, control):
        intrablock = None if features is None else unets.residuals(features, 2)
        expected = reference(
            x["sample"].clone(),
            x["timesteps"],
            x["text"],
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            down_intrablock_additional_residuals=intrablock,
            return_dict=False,
        )[0]
        residuals = [Injection([r], None, one) for r in net(*arguments(net, x))]
        found = ours(*unets.arguments(ours, x, features), residuals)
        assert_close("prediction", found, expected, "unet")
        assert (found - ours(*unets.arguments(ours, x, features))).abs().max() > 1e-2


@pytest.mark.parametrize("change", [fuse_encoder, fuse_qkv, pack_weights])
@pytest.mark.parametrize("union", [False, True])
@torch.no_grad()
def test_made_fast_it_computes_the_same(change, union):
    def make():
        return ControlNet.from_diffusers(build_union(), 2) if union else ControlNet.from_diffusers(build())

    plain, fast, x = make(), change(make()), inputs(2)
    for found, expected in zip(fast(*arguments(fast, x)), plain(*arguments(plain, x)), strict=True):
        assert_close("residual", found, expected, "unet")


@torch.no_grad()
def test_nothing_is_copied_and_nothing_is_missing():
    for theirs, control in ((build(), None), (build_union(), 0)):
        ours = ControlNet.from_diffusers(theirs, control)
        assert isinstance(ours, ControlNetUnion) is (control is not None)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        given = dict(theirs.named_parameters())
        assert all(given[name].data_ptr() == p.data_ptr() for name, p in ours.named_parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_pool_conditions", True),
        ("addition_embed_type", None),
        ("controlnet_conditioning_channel_order", "gbr"),
        ("conditioning_embedding_out_channels", (16, 32)),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("conditioning_channels", 0),
        ("class_embed_type", "timestep"),
    ],
)
def test_another_config_is_refused_by_its_name(key, value):
    with pytest.raises(InputError, match=f"^ControlNet config: {key} = .*expected"):
        ControlNetConfig.from_diffusers(OPTIONS | {key: value})
