"""Parts that wait elsewhere: the same pictures, on the device while they work and not after."""

from functools import cache

import pytest
import torch

from runtime import LocalControlPipeline, Region
from runtime.errors import InputError
from runtime.loading.load import from_diffusers
from runtime.optimize.offload import OFFLOADS, Offload, check_offload
from tests.support.tiny import make_adapter, make_pipeline
from tests.support.tolerances import relative_rms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
REGION = Region((torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.8).float())


@cache
def expected() -> torch.Tensor:
    pipe = LocalControlPipeline.from_diffusers(make_pipeline(), {"canny": make_adapter()})
    return pipe("a star", [REGION], steps=3, seed=0).latents


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", OFFLOADS)
def test_the_same_picture_twice(device, how):
    device, model = torch.device(device), from_diffusers(make_pipeline())
    adapters = {"canny": make_adapter().to(device)}
    pipe = LocalControlPipeline(model, adapters, offload=Offload(model, device, how))
    assert pipe.device == device
    for _ in range(2):
        made = pipe("a star", [REGION], steps=3, seed=0)
        assert relative_rms(made.latents.cpu(), expected()) < 1e-4 and len(made.images) == 1
    for part in (*model.text_encoders, model.vae, model.unet):
        names = {name.rpartition(".")[0] for name, p in part.named_parameters() if p.device.type != "cpu"}
        assert names <= (
            {"time_embedding.linear_1"} if how == "group" else set()
        )  # fetched for the next step


def test_parts_are_elsewhere_only_while_they_work(monkeypatch):
    """A copy stands in for what is on a GPU."""
    model = from_diffusers(make_pipeline())
    offload = Offload(model, torch.device("cpu"), "model")
    places = {part: [p.data_ptr() for p in getattr(model, part).parameters()] for part in ("vae", "unet")}
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    try:
        with offload.at_work("decode"):
            assert not {p.data_ptr() for p in model.vae.parameters()} & set(places["vae"])
            assert [p.data_ptr() for p in model.unet.parameters()] == places["unet"]
            raise KeyError
    except KeyError:
        assert [p.data_ptr() for p in model.vae.parameters()] == places["vae"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("disk", "offload 'disk': unknown, expected model, group"),
        ("model", "offload model: it saves a GPU's memory, and the device is cpu; leave it out"),
    ],
)
def test_what_does_not_go_together(how, message):
    with pytest.raises(InputError, match=message):
        check_offload(how, torch.device("cpu"))


def test_an_offloaded_unet_is_not_compiled():
    model = from_diffusers(make_pipeline())
    pipe = LocalControlPipeline(model, {}, offload=Offload(model, torch.device("cpu"), "model"))
    with pytest.raises(
        InputError, match="compile: offload model moves the UNet's weights; leave one of them out"
    ):
        pipe.compile()


@pytest.mark.gpu
@pytest.mark.parametrize("how", OFFLOADS)
def test_a_gpu_holds_less(how):
    peaks = []
    for offload in (None, how):
        pipe = LocalControlPipeline.from_pretrained("embedded", device="cuda", offload=offload)
        torch.cuda.reset_peak_memory_stats()
        pipe("a star", steps=2, seed=0)
        peaks.append(torch.cuda.max_memory_allocated())
        del pipe
    assert peaks[1] < peaks[0]


def test_layers_that_take_turns_are_computed_at_every_step():
    model, device = from_diffusers(make_pipeline()), torch.device("cpu")
    group = LocalControlPipeline(model, {}, offload=Offload(model, device, "group"))
    with pytest.raises(
        InputError, match="cache_interval 2: offload group computes every step whole; expected 1"
    ):
        group("a star", cache_interval=2)
    with pytest.raises(
        InputError, match="compile: offload group moves the UNet's weights; leave one of them out"
    ):
        group.compile()


def test_whole_parts_that_take_turns_have_step_caching():
    model, device = from_diffusers(make_pipeline()), torch.device("cpu")
    call = {"steps": 4, "seed": 0, "cache_interval": 2}
    plain = LocalControlPipeline(from_diffusers(make_pipeline()), {})("a star", **call).latents
    parts = LocalControlPipeline(model, {}, offload=Offload(model, device, "model"))
    assert torch.equal(parts("a star", **call).latents, plain)
