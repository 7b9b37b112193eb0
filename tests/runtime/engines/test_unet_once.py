"""The part of a compiled UNet that stays in torch: all of it, nothing else, and the same values."""

import json

import pytest
import torch

from runtime.engines.unet_once import load_once_per_image, save_once_per_image
from runtime.loading.load import from_diffusers
from runtime.optimize.fused import fuse_unet
from tests.support.tiny import make_pipeline

CPU = torch.device("cpu")
INPUTS = {
    "timesteps": torch.tensor([981.0, 1.0]),
    "pooled": torch.randn(2, 16),
    "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [32.0, 64, 1, 2, 32, 64]]),
}
TEXT = torch.randn(2, 77, 32)


def unet():
    return from_diffusers(make_pipeline()).unet


@pytest.fixture
def folder(tmp_path):
    save_once_per_image(unet(), tmp_path / "unet")
    return tmp_path / "unet"


def outputs(model, dtype=torch.float32):
    inputs = {name: x.to(dtype) if name == "pooled" else x for name, x in INPUTS.items()}
    pairs = model.project_text(TEXT.to(dtype))
    return [*model.embed_time(**inputs), *(x for pair in pairs for x in pair)]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_what_the_whole_unet_does(tmp_path, dtype):
    whole = unet().to(dtype)
    save_once_per_image(whole, tmp_path / "unet")
    loaded = load_once_per_image(tmp_path / "unet", CPU, dtype, {})
    for made, expected in zip(outputs(loaded, dtype), outputs(whole, dtype), strict=True):
        assert made.dtype == dtype and torch.equal(made, expected)


def test_a_unet_that_was_made_faster_is_refused(tmp_path):
    """Its time projections hold biases that an exported graph adds itself."""
    with pytest.raises(ValueError, match="export a model as it was loaded"):
        save_once_per_image(fuse_unet(unet()), tmp_path)
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_a_step_needs_none_of_it():
    whole = unet()
    time, text = [t[0] for t in whole.embed_time(**INPUTS)], whole.project_text(TEXT)
    sample = torch.randn(2, 4, 8, 8)
    expected = whole(sample, time, text)
    once = whole.once_per_image()
    whole.load_state_dict({name: p.to("meta") for name, p in once.items()}, strict=False, assign=True)
    assert torch.equal(whole(sample, time, text), expected)


def test_the_rest_takes_no_memory(folder):
    loaded = load_once_per_image(folder, CPU, torch.float32, {})
    there = {name for name, p in loaded.named_parameters() if not p.is_meta}
    assert there == set(loaded.once_per_image()) and 0 < len(there) < len(list(loaded.parameters()))
    assert loaded.config == unet().config


def test_a_weight_is_exchanged_by_its_name(folder):
    plain = load_once_per_image(folder, CPU, torch.float32, {})
    name = next(name for name in plain.once_per_image() if name.endswith("to_k.weight"))
    new = torch.full_like(plain.get_parameter(name), 0.5)
    exchanged = load_once_per_image(folder, CPU, torch.float32, {name: new, "conv_in.weight": new})
    assert torch.equal(exchanged.get_parameter(name), new) and exchanged.conv_in.weight.is_meta


def test_the_config_is_plain_json(folder):
    assert json.loads((folder / "config.json").read_text())["block_out_channels"] == [32, 64, 64]
