"""The regions that a command line describes."""

import json

import pytest

from runtime.cli.options import make_parser
from runtime.cli.regions import parse_region, read_regions, region_fields
from runtime.errors import InputError


def options(*arguments: str):
    return make_parser().parse_args(["--prompt", "x", *arguments])


def test_a_region_is_keys_and_values():
    text = "condition=a, b.png,mask = m.png,scale=0.5,levels=1:1:0:0"
    assert parse_region(text) == {
        "condition": "a, b.png",
        "mask": "m.png",
        "scale": "0.5",
        "levels": "1:1:0:0",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("house.png", "'house.png' has no value"),
        ("scale=1,scale=2", "scale is given twice"),
        ("", "has no value"),
    ],
)
def test_a_region_of_another_form_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_region(text)


def test_single_region_options_come_first_then_region_then_file(tmp_path):
    file = tmp_path / "regions.json"
    file.write_text(json.dumps([{"condition": "c.png", "scale": 0.2}]))
    found = region_fields(
        options("--condition", "a.png", "--end", "0.5", "--region", "condition=b.png", "--regions", str(file))
    )
    assert [name for name, _, _ in found] == ["region", "--region 1", f"{file} region 1"]
    assert [fields["condition"] for _, fields, _ in found] == ["a.png", "b.png", "c.png"]
    assert [folder for _, _, folder in found] == [None, None, tmp_path]
    assert found[0][1]["end"] == "0.5"


def test_no_region_is_no_control():
    assert region_fields(options()) == []


@pytest.mark.parametrize(
    ("arguments", "adapter"),
    [
        ((), None),
        (("--adapter", "sketch=a"), "sketch"),
        (("--adapter", "sketch=a", "--adapter", "depth=b", "--control", "depth"), "depth"),
    ],
)
def test_the_adapter_is_the_one_named_or_the_first_loaded(arguments, adapter):
    ((_, fields, _),) = region_fields(options("--condition", "a.png", *arguments))
    assert fields.get("adapter") == adapter
    ((_, fields, _),) = region_fields(options("--region", "condition=a.png,adapter=mine", *arguments))
    assert fields["adapter"] == "mine"


def test_region_options_need_a_condition():
    with pytest.raises(InputError, match="--mask, --mask-condition without --condition"):
        region_fields(options("--mask", "m.png", "--mask-condition"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("[", "is not JSON"),
        (
            '[{"mask": "a.png", "scale": 1, "mask": "b.png"}]',
            "'mask' is given twice in an object; expected it once",
        ),
        ("{}", "is not a list of regions"),
        ("[]", "is not a list"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
)
def test_a_regions_file_of_another_form_is_refused(tmp_path, content, message):
    path = tmp_path / "regions.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_regions(str(path))
    assert str(path) in str(caught.value)


def test_a_regions_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "regions.json"
    path.write_text('[{"prompt": "a star"}]', "utf-8-sig")
    assert read_regions(str(path)) == [{"prompt": "a star"}]
