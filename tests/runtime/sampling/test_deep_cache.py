"""Step caching: exact where nothing is cached, and what makes the deep features be computed anew."""

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel

from runtime import LocalControlPipeline, Region
from runtime.control.features import first_alike
from runtime.errors import InputError
from runtime.model.blocks import Injection
from runtime.model.unet import UNet
from runtime.sampling.deep_cache import DeepCache
from tests.support.tiny import make_adapter, make_pipeline
from tests.support.tolerances import relative_rms

ATTENDING = {  # attention at the finest level too, where the control comes before the downsampler
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}


@cache
def pipe() -> LocalControlPipeline:
    return LocalControlPipeline.from_diffusers(make_pipeline(), {"canny": make_adapter()})


@torch.inference_mode()
@pytest.mark.parametrize(
    "options", [{}, ATTENDING, {"layers_per_block": 2}], ids=["SDXL", "attending", "two layers"]
)
@pytest.mark.parametrize("size", [(8, 8), (9, 12)])
def test_a_shallow_pass_on_its_own_deep_features_is_the_whole_pass(options, size):
    torch.manual_seed(0)
    unet = UNet.from_diffusers(
        UNet2DConditionModel.from_config({**make_pipeline().unet.config, **options}).eval()
    )
    sample = torch.randn(2, 4, *size)
    time = [t[0] for t in unet.embed_time(torch.tensor([500.0]), torch.randn(2, 16), torch.ones(2, 6))]
    text = unet.project_text(torch.randn(2, 77, 32))
    strides = ((1, 1), (2, 2), (4, 4), (4, 4)) if options is ATTENDING else ((2, 2), (2, 2), (4, 4), (4, 4))
    control = [
        torch.randn(1, c, -(-size[0] // a), -(-size[1] // b))
        for c, (a, b) in zip(unet.config.control_channels, strides, strict=True)
    ]
    if options is ATTENDING:
        control[1] = torch.randn(1, unet.config.control_channels[1], -(-size[0] // 2), -(-size[1] // 2))
    control = [Injection([level], None, torch.ones(1)) for level in control]
    deep, _ = unet.deep_features(sample, iter(time), iter(text), control)
    assert torch.equal(
        unet.forward_shallow(sample, time, text, control, deep), unet(sample, time, text, control)
    )


class Counted:
    """Stands in for the UNet: notes at which steps it computes everything."""

    def __init__(self):
        self.whole = []

    def __call__(self, sample, time, text, control, residuals):
        return self.deep_features(sample, time, text, control, residuals)[0]

    def deep_features(self, sample, time, text, control, residuals):
        self.whole.append(int(sample[0, 0, 0, 0]))
        return sample.new_zeros(len(sample)), []

    def finish(self, deep, skips, time, text):
        return deep

    def forward_shallow(self, sample, time, text, control, deep, residuals):
        return deep


def computed(interval, strengths=None, rows=(2,) * 8):
    unet = Counted()
    segments = [0] * len(rows) if strengths is None else first_alike(torch.tensor(strengths)[:, None])
    cached = DeepCache(unet, interval, segments)
    for i, count in enumerate(rows):
        cached(i, torch.full((count, 1, 1, 1), i), [], [], None)
    return unet.whole


def test_every_so_many_steps():
    assert computed(1) == list(range(8))
    assert computed(2) == [0, 2, 4, 6]
    assert computed(3) == [0, 3, 6]
    assert computed(100) == [0]


def test_a_control_that_changes_makes_them_be_computed_anew():
    assert computed(4, [1.0] * 8) == [0, 4]
    assert computed(4, [1.0] * 3 + [0.0] * 5) == [0, 3, 7]
    assert computed(4, [0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]) == [0, 1, 2, 6]


def test_guidance_that_begins_or_ends_makes_them_be_computed_anew():
    assert computed(4, rows=(1, 1, 2, 2, 2, 2, 1, 1)) == [0, 2, 6]


def test_a_pipeline_caches_where_it_is_asked_to():
    region = Region((torch.rand(1, 1, 64, 64) > 0.8).float())
    call = {"steps": 6, "seed": 3}
    exact = pipe()("a star", [region], **call).latents
    assert torch.equal(pipe()("a star", [region], cache_interval=1, **call).latents, exact)
    cached = pipe()("a star", [region], cache_interval=2, **call).latents
    assert 0 < relative_rms(cached, exact) < 0.5


@pytest.mark.parametrize("interval", [0, -1, 1.5, "2"])
def test_an_interval_is_a_count(interval):
    with pytest.raises(
        InputError, match=f"cache_interval {interval!r}: expected a whole number of at least 1"
    ):
        pipe()("a star", cache_interval=interval)
