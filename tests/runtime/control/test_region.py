"""runtime.control.region: fields are checked by name, pictures are packed to the picture's size."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.control import conditions
from runtime.control.masks import box
from runtime.control.region import PackedRegion, Region, pack, pad_regions
from tests.support.refusals import refusal


@pytest.fixture
def condition():
    return torch.rand(1, 1, 64, 64)


def test_defaults_and_conversion(condition):
    region = Region(condition, levels=[1, np.float32(0.5), 0, True + 1], scale=-2)
    assert region.levels == (1.0, 0.5, 0.0, 2.0)
    assert region.scale == -2.0  # away from the condition: allowed
    assert (region.mask, region.adapter, region.start, region.end) == (None, "canny", 0.0, 1.0)
    assert region.mask_condition is False


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"start": 0.8, "end": 0.2}, "region: start 0.8 is after end 0.2; expected 0 <= start <= end <= 1"),
        ({"start": -0.1}, "region: start -0.1 is outside [0, 1]; expected 0 <= start <= end <= 1"),
        ({"end": 1.5}, "region: end 1.5 is outside [0, 1]; expected 0 <= start <= end <= 1"),
        ({"end": "late"}, "region: end 'late'; expected a finite number"),
        ({"scale": math.nan}, "region: scale nan; expected a finite number"),
        ({"scale": -math.inf}, "region: scale -inf; expected a finite number"),
        ({"scale": None}, "region: scale None; expected a finite number"),
        ({"scale": True}, "region: scale True; expected a finite number"),
        ({"scale": torch.ones(2)}, "region: scale tensor([1., 1.]); expected a finite number"),
        ({"levels": (1, 1, 1)}, "region: levels (1, 1, 1); expected 4 finite numbers, one for each level"),
        ({"levels": 1}, "region: levels 1; expected 4 finite numbers, one for each level"),
        ({"levels": (1, 1, 1, math.nan)}, "levels (1, 1, 1, nan) has nan; expected a finite number"),
        ({"adapter": ""}, "region: adapter ''; expected the name of an adapter"),
        ({"adapter": None}, "region: adapter None; expected the name of an adapter"),
        ({"mask_condition": "maybe"}, "region: mask_condition 'maybe'; expected true or false"),
        ({"condition": None}, "region: condition is missing, and so is a prompt; expected a picture, words"),
    ],
)
def test_bad_fields_are_named_with_their_value(fields, expected, condition):
    assert expected in refusal(Region, **{"condition": condition, **fields})


def test_pack_resizes_and_keeps_channels():
    grey, colour = torch.rand(1, 1, 128, 128), Image.new("RGB", (64, 64), (255, 0, 0))
    packed = pack([Region(grey, mask=torch.ones(32, 32)), Region(colour)], 64, 64)
    assert packed[0].condition.shape == (1, 1, 64, 64)
    assert packed[0].mask.shape == (1, 1, 64, 64)
    assert packed[1].condition.shape == (1, 3, 64, 64)
    assert packed[1].condition[0, :, 0, 0].tolist() == [1, 0, 0]
    assert packed[1].mask is None
    for item in packed:
        assert item.condition.dtype == torch.float32
        assert 0 <= item.condition.min() <= item.condition.max() <= 1


def test_a_condition_of_the_right_size_is_unchanged(condition):
    assert torch.equal(pack([Region(condition)], 64, 64)[0].condition, condition)


def test_pack_of_nothing_is_empty():
    assert pack([], 64, 64) == []


def test_regions_are_padded_with_their_last_rows_and_columns():
    (small,) = pack([Region(torch.rand(1, 1, 30, 20), mask=torch.rand(30, 20))], 30, 20)
    (padded,) = pad_regions([small], 32, 32)
    for large, own in ((padded.condition, small.condition), (padded.mask, small.mask)):
        assert large.shape[2:] == (32, 32) and torch.equal(large[..., :30, :20], own)
        assert (large[..., 31, :20] == own[..., 29, :]).all() and (large[..., :30, 31] == own[..., 19]).all()
    assert pad_regions([PackedRegion(small.condition, None, small.region)], 32, 32)[0].mask is None


def test_another_aspect_ratio_warns_for_mask_and_condition(condition):
    with pytest.warns(UserWarning, match="region 1 mask: 32 x 64 px is stretched to 64 x 64"):
        pack([Region(condition, mask=torch.ones(64, 32))], 64, 64)
    with pytest.warns(UserWarning, match="region 2 condition: 64 x 64 px is stretched to 128 x 64"):
        pack([Region(torch.rand(64, 128)), Region(condition)], 64, 128)


@pytest.mark.parametrize("preprocess", ["none", "canny"])
@pytest.mark.parametrize("largest", [np.uint8(1), np.uint16(1000)])
def test_a_condition_that_is_nearly_black_is_warned_of(largest, preprocess, recwarn):
    lines = np.zeros((64, 64), largest.dtype)
    pack([Region(lines, preprocess=preprocess)], 64, 64)
    assert not recwarn  # all of it black: nothing is drawn there
    lines[::8] = largest
    with pytest.warns(
        UserWarning, match=r"region 1 condition: nearly black, its brightest value is .* of 255"
    ):
        pack([Region(lines, preprocess=preprocess)], 64, 64)


def test_a_condition_that_is_black_in_8_bits_is_warned_of(tmp_path):
    Image.fromarray(np.eye(64, dtype=np.uint16)).save(tmp_path / "lines.png")
    with pytest.warns(UserWarning, match="black in 8 bits, its brightest value is 1 of 65535"):
        pack([Region(tmp_path / "lines.png")], 64, 64)


def test_a_black_mask_warns_that_there_is_no_control(condition):
    with pytest.warns(UserWarning, match="region 1 mask: all zero .* no control"):
        pack([Region(condition, mask=torch.zeros(64, 64))], 64, 64)


def test_nothing_is_warned_of_without_a_reason(condition):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack([Region(condition, mask=box(96, 96, (0, 0, 1, 1)), mask_condition=True)], 64, 64)


def test_bad_pictures_name_the_region(condition, tmp_path):
    nan = torch.full((64, 64), torch.nan)
    assert "region 2 condition: contains NaN" in refusal(pack, [Region(condition), Region(nan)], 64, 64)
    assert "region 1 mask: contains NaN" in refusal(pack, [Region(condition, mask=nan)], 64, 64)
    missing = Region(tmp_path / "none.png")
    assert f"region 1 condition: {tmp_path / 'none.png'} does not exist" in refusal(pack, [missing], 64, 64)
    assert "region 1: a str; expected" in refusal(pack, ["photo.png"], 64, 64)


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (96, 96)], ids=["same", "smaller", "larger"])
def test_mask_condition_hides_all_outside_the_mask(size, condition):
    mask = box(64, 64, (0, 0, 30, 64)) * 0.5
    changed = torch.where(mask > 0, condition, torch.rand_like(condition))
    hidden, other, plain = (
        pack([Region(source, mask=mask, mask_condition=hide)], *size)[0]
        for source, hide in ((condition, True), (changed, True), (condition, False))
    )
    assert torch.equal(hidden.condition, other.condition)
    assert (hidden.condition[hidden.mask == 0] == 0).all()
    assert (plain.condition[plain.mask == 0] > 0).any()
    if size == (64, 64):
        assert torch.equal(hidden.condition[mask > 0], condition[mask > 0])


def test_a_touched_pixel_of_a_finer_mask_keeps_its_condition():
    mask = torch.zeros(128, 128)
    mask[0, 0] = 1
    packed = pack([Region(torch.ones(64, 64), mask=mask, mask_condition=True)], 64, 64)[0]
    assert packed.condition.nonzero().tolist() == [[0, 0, 0, 0]]
    assert packed.mask.flatten()[0] == 0.25


def test_from_dict_converts_strings():
    text = {
        "condition": "photo.png",
        "mask": "",
        "adapter": "sketch",
        "scale": "0.5",
        "start": " .25",
        "end": "1",
        "levels": "1,1, 0.5,0",
        "mask_condition": "yes",
    }
    region = Region.from_dict(text, "region 1")
    assert region.condition == Path("photo.png")
    assert region.mask is None
    assert (region.adapter, region.scale, region.start, region.end) == ("sketch", 0.5, 0.25, 1.0)
    assert (
        region.levels == Region.from_dict({"condition": "a", "levels": "1:1:0.5:0"}).levels == (1, 1, 0.5, 0)
    )
    assert region.mask_condition is True


def test_from_dict_takes_json_values(condition):
    entry = json.loads('{"scale": 2, "levels": [1, 0, 1, 0], "mask_condition": false, "mask": null}')
    region = Region.from_dict({"condition": condition, **entry})
    assert region.condition is condition
    assert (region.scale, region.levels) == (2.0, (1.0, 0.0, 1.0, 0.0))


def test_from_dict_resolves_relative_paths(tmp_path):
    absolute = tmp_path / "elsewhere" / "mask.png"
    region = Region.from_dict({"condition": "photo.png", "mask": str(absolute)}, base=tmp_path)
    assert region.condition == tmp_path / "photo.png"
    assert region.mask == absolute


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"conditon": "a.png"},
            "region 3: unknown key conditon; expected condition, mask, adapter, scale, start",
        ),
        ({"mask": "a.png"}, "region 3: condition is missing"),
        ({"condition": ""}, "region 3: condition is missing"),
        ({"condition": "a.png", "scale": "much"}, "region 3: scale 'much'; expected a finite number"),
        ({"condition": "a.png", "levels": "1,1,1"}, "region 3: levels '1,1,1'; expected 4 finite numbers"),
        ({"condition": "a.png", "start": "1", "end": "0"}, "region 3: start 1 is after end 0"),
        ("condition=a.png", "region 3: 'condition=a.png' is not a region"),
    ],
)
def test_from_dict_names_the_region_and_the_key(fields, expected):
    text = refusal(Region.from_dict, fields, "region 3")
    assert text.startswith("region 3")
    assert expected in text


def test_from_dict_lists_the_known_preprocessors(condition):
    for unknown in ("cany", ["canny"], 3):
        text = refusal(Region.from_dict, {"condition": condition, "preprocess": unknown}, "region 1")
        assert (
            text
            == f"region 1: preprocess {unknown!r} is unknown; expected one of {', '.join(conditions.names())}"
        )


def test_from_dict_preprocesses_at_the_size_of_the_picture(tmp_path):
    Image.fromarray((box(512, 512, (100, 100, 400, 400))[0, 0] * 255).byte().numpy()).save(tmp_path / "p.png")
    fields = {"condition": "p.png", "preprocess": "canny"}
    region = Region.from_dict(fields, base=tmp_path).read()
    assert (
        pack([region], 128, 128)[0].condition.max() == 1
    )  # shrunk afterwards, the one-pixel lines would fade
    native = conditions.preprocess("canny", tmp_path / "p.png")
    assert pack([Region(native)], 128, 128)[0].condition.max() < 0.6
    with pytest.warns(UserWarning, match="region condition: 512 x 512 px is stretched"):
        pack([region], 64, 128)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"condition": "none.png"}, "region 3 condition: none.png does not exist"),
        ({"condition": "~nobody-of-that-name/a.png", "preprocess": "canny"}, "cannot be read"),
        ({"condition": Image.new("L", (8, 8)), "mask": "none.png"}, "region 3 mask: none.png does not exist"),
        ({"condition": Image.new("L", (8, 8)), "preprocess": "depth"}, "region 3: depth: no depth model"),
    ],
)
def test_reading_names_the_region_and_the_picture(fields, expected, monkeypatch):
    monkeypatch.delenv(conditions.DEPTH_MODEL_VARIABLE, raising=False)
    text = refusal(Region.from_dict(fields, "region 3").read)
    assert text.startswith("region 3") and expected in text


def test_a_picture_that_several_regions_name_is_decoded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (32, 32), 255).save("p.png")
    opened = {}
    regions = [
        Region(path, mask="p.png").read(opened) for path in ("p.png", Path("p.png"), tmp_path / "p.png")
    ]
    assert (
        len({id(region.condition) for region in regions}) == len({id(region.mask) for region in regions}) == 1
    )
    assert len(opened) == 2  # a picture's transparency is white, a mask's black
