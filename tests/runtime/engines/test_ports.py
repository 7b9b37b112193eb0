"""runtime.engines.ports: the sizes an engine was built for, and the shapes of its inputs and outputs at them."""

import pytest
import torch

from runtime.engines.ports import Axis, Port, Profile
from runtime.errors import InputError

PROFILE = Profile(images=(1, 2, 4), height=(512, 768, 1024), width=(640, 640, 640))
SAMPLE = Port("sample", torch.float32, (Axis("rows"), 4, Axis("height", 8), Axis("width", 8)))


@pytest.mark.parametrize("text", ["height", "height/8", "width/64", "rows", "items"])
def test_an_axis_is_the_one_its_text_says(text):
    assert str(Axis.parse(text)) == text


@pytest.mark.parametrize(("text", "axis"), [("rows", Axis("rows", 1)), ("height/8", Axis("height", 8))])
def test_an_axis_of_its_text(text, axis):
    assert Axis.parse(text) == axis


@pytest.mark.parametrize(
    ("axis", "height", "length"),
    [
        (Axis("height"), 1040, 1040),
        (Axis("height", 8), 1040, 130),
        (Axis("height", 16), 1040, 65),
        (Axis("height", 32), 1040, 33),
        (Axis("height", 64), 1040, 17),
        (Axis("height", 64), 16, 1),
    ],
    ids=str,
)
def test_an_axis_is_rounded_up(axis, height, length):
    assert axis.of({"height": height, "width": 1, "rows": 2}) == length


def test_a_port_at_a_size():
    assert SAMPLE.sized({"rows": 3, "height": 528, "width": 640}) == (3, 4, 66, 80)
    assert Port("time_ids", torch.float32, (2, 6)).sized({}) == (2, 6)


@pytest.mark.parametrize(
    ("guidance", "rows"), [("both", (1, 4, 8)), ("always", (2, 4, 8)), ("never", (1, 2, 4))]
)
def test_rows_of_the_unet(guidance, rows):
    profile = Profile((1, 2, 4), PROFILE.height, PROFILE.width, guidance)
    assert profile.range("rows") == rows
    assert profile.shapes(Port("pooled", torch.float16, (Axis("rows"), 5))) == tuple((row, 5) for row in rows)


@pytest.mark.parametrize("guidance", ["both", "always", "never"])
@pytest.mark.parametrize("images", [(1, 1, 1), (1, 2, 4), (2, 3, 4), (4, 4, 4)], ids=str)
def test_items_go_down_to_one_whatever_the_batch(images, guidance):
    assert Profile(images, PROFILE.height, PROFILE.width, guidance).range("items") == (1, *images[1:])


def test_ranges_of_pixels():
    assert PROFILE.range("height") == (512, 768, 1024)
    assert PROFILE.range("width") == (640, 640, 640)


def test_shapes():
    assert PROFILE.shapes(SAMPLE) == ((1, 4, 64, 80), (4, 4, 96, 80), (8, 4, 128, 80))
    assert PROFILE.shapes(Port("timestep", torch.float32, (1,))) == ((1,), (1,), (1,))


@pytest.mark.parametrize(
    ("profile", "dynamic"),
    [
        (PROFILE, {"rows", "items", "height"}),
        (Profile((1, 1, 1), (64, 64, 64), (64, 64, 96), "both"), {"rows", "width"}),
        (Profile((1, 1, 1), (64, 64, 64), (64, 64, 64), "always"), set()),
        (Profile((1, 1, 1), (64, 64, 64), (64, 64, 64), "never"), set()),
        (Profile((2, 2, 2), (64, 64, 64), (64, 64, 64), "never"), {"items"}),
    ],
    ids=["ranges", "guidance or not", "always guided", "never guided", "a batch of 2"],
)
def test_only_what_differs_is_dynamic(profile, dynamic):
    axes = (Axis("rows"), Axis("items"), Axis("height", 8), Axis("width", 64))
    assert {axis.name for axis in axes if profile.is_dynamic(axis)} == dynamic


@pytest.mark.parametrize("height", [512, 768, 1024])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_size_that_was_built(rows, height):
    PROFILE.check({"rows": rows, "items": 1, "height": height, "width": 640})
    PROFILE.check({})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"height": 496},
            "height 496: the engines were built for 512 to 1024; rebuild with another --height",
        ),
        (
            {"height": 1040},
            "height 1040: the engines were built for 512 to 1024; rebuild with another --height",
        ),
        ({"width": 656}, "width 656: the engines were built for 640; rebuild with another --width"),
        ({"items": 5}, "images 5: the engines were built for 1 to 4; rebuild with another --batch"),
        (
            {"rows": 10},
            "rows of the UNet (images, twice with guidance) 10: the engines were built for 1 to 8; rebuild with "
            "another --batch and --guidance",
        ),
    ],
    ids=["too low", "too high", "another than the only one", "too many images", "too many rows"],
)
def test_a_size_that_was_not_built(sizes, message):
    with pytest.raises(InputError) as raised:
        PROFILE.check({"rows": 1, "height": 512, "width": 640, "items": 1} | sizes)
    assert str(raised.value) == message


@pytest.mark.parametrize(("guidance", "rows"), [("always", 1), ("never", 2)])
def test_the_other_guidance_than_was_built(guidance, rows):
    profile = Profile((1, 1, 1), (64, 64, 64), (64, 64, 64), guidance)
    with pytest.raises(InputError, match=rf"rows of the UNet .* {rows}: .*--guidance"):
        profile.check({"rows": rows})
    profile.check({"rows": 3 - rows})
