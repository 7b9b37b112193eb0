"""runtime.capabilities: what cannot be drawn is refused before anything is loaded, naming the field."""

import pytest
import torch

from runtime.capabilities import Capabilities, of_manifest
from runtime.control.region import Region
from runtime.engines.manifest import read_manifest
from runtime.engines.ports import Profile
from runtime.errors import InputError
from runtime.sampling.request import Request
from tests.support import engines

PROFILE = Profile(images=(1, 1, 2), height=(32, 64, 96), width=(32, 64, 96), guidance="always")
ENGINE = Capabilities({"canny"}, side=64, profile=PROFILE, whole_steps="a compiled UNet", fixed_text=True)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"regions": [Region(torch.ones(8, 8), adapter="depth")]}, "region 1: adapter 'depth' is unknown"),
        ({"cache_interval": 2}, "cache_interval 2: a compiled UNet computes every step whole; expected 1"),
        ({"clip_skip": 1}, "clip_skip 1: the compiled text encoders have one layer's states; expected 0"),
        ({"height": 128}, "height 128: the engines were built for 32 to 96"),
        ({"images_per_prompt": 3}, "rows of the UNet .* 6: the engines were built for 2 to 4"),
        ({"guidance": 1}, "rows of the UNet .* 1: the engines were built for"),
        ({"guidance_range": (0, 0.6)}, "rows of the UNet .* 1: the engines were built for"),
    ],
    ids=["adapter", "cache", "layers", "size", "images", "no guidance", "guidance at times"],
)
def test_what_an_engine_cannot_draw_is_named(asked, message):
    ENGINE.check(Request("x", steps=10))
    with pytest.raises(InputError, match=message):
        ENGINE.check(Request("x", steps=10, **asked))


def test_the_models_own_size_counts_where_none_is_asked_for():
    with pytest.raises(InputError, match="height 1024: the engines were built for 32 to 96"):
        Capabilities({"canny"}, side=1024, profile=PROFILE).check(Request("x"))


def test_pytorch_takes_any_size():
    Capabilities(None).check(Request("x", height=1024, cache_interval=3, images_per_prompt=9))


def test_a_manifest_says_all_of_it():
    found = of_manifest(read_manifest(engines.folder("onnxruntime")))
    assert found.side == 64 and found.adapters == ["canny"] and found.whole_steps == "a compiled UNet"
