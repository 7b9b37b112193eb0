"""export.sizes: one size, or smallest:usual:largest, as a profile."""

import pytest

from export.sizes import make_profile, parse_range
from runtime.engines.ports import Profile
from runtime.errors import InputError

DEFAULT = 1024


def profile(
    batch: str = "1", height: str | None = None, width: str | None = None, guidance="both"
) -> Profile:
    return make_profile({"batch": batch, "height": height, "width": width}, guidance, DEFAULT)


@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        ("1", (1, 1, 1)),
        ("768", (768, 768, 768)),
        ("1:2:4", (1, 2, 4)),
        ("2:2:2", (2, 2, 2)),
        ("1:4:4", (1, 4, 4)),
    ],
)
def test_a_range(value, sizes):
    assert parse_range("--batch", value) == sizes


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "1.5",
        "1e3",
        "0",
        "-1",
        "1:2",
        "1:2:3:4",
        "4:2:1",
        "1:4:2",
        "0:1:2",
        "-1:1:2",
        "1::2",
        "1:2:",
        "1x2",
    ],
)
def test_no_range(value):
    expected = "expected a whole number, or smallest:usual:largest such as 512:1024:1536"
    with pytest.raises(InputError) as raised:
        parse_range("--batch", value)
    assert str(raised.value) == f"--batch {value}: {expected}"


def test_the_models_own_size_where_none_is_given():
    assert profile() == Profile((1, 1, 1), (DEFAULT,) * 3, (DEFAULT,) * 3, "both")
    assert profile(width="512") == Profile((1, 1, 1), (DEFAULT,) * 3, (512,) * 3, "both")


def test_every_size_and_the_guidance():
    made = profile("1:2:4", "512:768:1024", "16:16:2048", guidance="never")
    assert made == Profile((1, 2, 4), (512, 768, 1024), (16, 16, 2048), "never")


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("100", "{side} 100: not a multiple of 16; the nearest: 96 and 112"),
        ("8", "{side} 8: not a multiple of 16; the nearest: 16"),
        ("500:512:1024", "{side} 500: not a multiple of 16"),
        ("512:760:1024", "{side} 760: not a multiple of 16"),
        ("512:768:1000", "{side} 1000: not a multiple of 16"),
        ("1024:512:768", "--{side} 1024:512:768: expected"),
        ("0", "--{side} 0: expected"),
    ],
)
def test_pixels_that_no_latent_has(side, value, message):
    with pytest.raises(InputError, match=message.format(side=side)):
        profile(**{side: value})


def test_a_batch_needs_no_multiple_of_16():
    assert profile("3:5:7").images == (3, 5, 7)
    with pytest.raises(InputError, match="--batch 2:1:4: expected"):
        profile("2:1:4")
