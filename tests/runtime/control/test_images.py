"""runtime.control.images: everything a user may hand over is read alike, or refused in one line that names it."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.control.images import fit, load_image, load_tensor, to_tensor
from runtime.errors import InputError
from tests.support.refusals import refusal
from tests.support.tolerances import assert_close


def picture(height=6, width=8, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_an_input_error_is_one_line():
    assert str(InputError("a\nb\r\nc")) == "a b c"


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_every_kind_of_source_gives_the_same_picture(channels, tmp_path):
    pixels = picture(channels=channels)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    chw = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
    sources = [
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        pixels,
        pixels[..., None] if channels == 1 else pixels,
        pixels.astype(np.float64) / 255,
        chw,
        chw[None],
        chw.float() / 255,
        (chw.float() / 255).requires_grad_(),
    ]
    for source in sources:
        result = load_image(source)
        assert result.mode == ("L" if channels == 1 else "RGB")
        assert np.array_equal(np.array(result), pixels)
        assert torch.equal(load_tensor(source), chw[None].float() / 255)


def test_a_float_tensor_is_not_rounded_to_8_bits():
    source = torch.rand(1, 3, 5, 7)
    assert torch.equal(load_tensor(source), source)


def test_to_tensor_is_channels_first_in_unit_range():
    tensor = to_tensor(Image.fromarray(picture()))
    assert tensor.shape == (1, 3, 6, 8)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor[0, 2, 5, 7] == picture()[5, 7, 2] / np.float32(255)


def test_transparency_is_laid_on_the_background():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert load_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(image, background="black").getpixel((0, 0)) == (0, 0, 0)
    assert load_image(image).getpixel((1, 0)) == (10, 20, 30)
    assert torch.equal(load_tensor(to_rgba_tensor(image)), load_tensor(image))
    assert torch.equal(
        load_tensor(np.array(image), background="black"), load_tensor(image, background="black")
    )


def to_rgba_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_palette_with_transparency():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([200, 0, 0, 0, 0, 100])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    result = load_image(image)
    assert [result.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for source in (tmp_path / "deep.png", values, Image.fromarray(values.astype(np.int32))):
        assert np.array(load_image(source)).tolist() == [[0, 100, 255]]


def test_float_and_cmyk_pictures(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "float.tiff")
    assert np.array(load_image(tmp_path / "float.tiff")).tolist() == [[0, 128, 255]]
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "print.tiff")
    assert load_image(tmp_path / "print.tiff").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr"]
)
def test_every_mode_becomes_grey_or_rgb(mode):
    assert load_image(Image.new(mode, (3, 2))).mode == ("L" if mode in ("1", "L", "LA", "La") else "RGB")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (np.full((4, 4), np.nan), "contains NaN or infinity"),
        (torch.tensor([[0.0, torch.inf]]), "contains NaN or infinity"),
        (np.full((4, 4), 255.0), "values from 255 to 255; expected uint8, or float in [0, 1]"),
        (torch.full((3, 4, 4), -0.5), "values from -0.5 to -0.5"),
        (np.zeros((4, 4), np.int64), "values of type torch.int64"),
        (np.zeros((4, 4), np.complex64), "values of type complex64"),
        (np.array([["a"]]), "values of type <U1"),
        (np.zeros((3, 4, 5)), "shape (3, 4, 5); expected an array (H, W), (H, W, C)"),
        (np.zeros((2, 4, 4, 3)), "shape (2, 4, 4, 3)"),
        (torch.zeros(2, 3, 4, 4), "shape (2, 3, 4, 4); expected a tensor (H, W), (C, H, W) or (1, C, H, W)"),
        (torch.zeros(3, 0, 4), "shape (3, 0, 4)"),
        (np.zeros(4), "shape (4,)"),
        (np.ma.masked_array(np.zeros((2, 2)), mask=[[0, 1], [0, 0]]), "an array with masked values"),
        (torch.zeros(4, 4).to_sparse(), "a tensor of kind sparse_coo; expected a dense one, with values"),
        (torch.zeros(4, 4, device="meta"), "a tensor of kind meta; expected a dense one, with values"),
        (None, "a NoneType is not an image; expected a path, a PIL image, an array or a tensor"),
        (b"bytes", "a bytes is not an image"),
        (Image.new("L", (0, 4)), "is 0 x 4 px"),
        (Image.new("I", (2, 2), -1), "values from -1 to -1; expected 0 to 65535"),
    ],
)
def test_bad_arrays_say_what_was_found_and_expected(source, expected):
    for load in (load_image, load_tensor):
        text = refusal(load, source, "region 2 condition")
        assert text.startswith("region 2 condition: ")
        assert expected in text


def test_rounding_out_of_range_is_clamped():
    assert load_tensor(torch.tensor([[-1e-6, 1 + 1e-6]])).tolist() == [[[[0.0, 1.0]]]]


def test_fit_warns_of_another_aspect_ratio_only():
    image = torch.rand(1, 3, 100, 151)
    with pytest.warns(UserWarning, match="mask: 151 x 100 px is stretched to 32 x 32"):
        assert fit(image, 32, 32, "mask").shape == (1, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(image, 64, 96).shape == (1, 3, 64, 96)
        assert fit(image, 100, 151) is image


def test_fit_averages():
    image = torch.rand(1, 1, 8, 8)
    expected = image.reshape(1, 1, 4, 2, 4, 2).mean((3, 5))
    assert_close("average", fit(image, 4, 4, mode="area"), expected)
    lines = torch.zeros(1, 1, 64, 64)
    lines[..., ::8] = 1
    assert fit(lines, 8, 8).std() < 0.1  # antialiased: no line is skipped and none is kept whole
    assert fit(lines, 8, 8).mean() == pytest.approx(lines.mean().item(), abs=0.03)


LARGE = """
import resource, sys, warnings
from PIL import Image
from runtime.control.region import Region, pack
warnings.simplefilter("ignore")
pack([Region(condition=Image.new("L", (64, 64)), mask=Image.new("L", (64, 64)))], 64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack([Region(condition=sys.argv[1], mask=sys.argv[1], preprocess="none")], 64, 64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_picture_takes_bytes_and_not_floats(tmp_path):
    """A picture of 20 million pixels, painted in two colours on transparent: 100 bytes a pixel before."""
    picture = Image.new("RGBA", (4000, 5000))
    picture.paste((255, 0, 0, 255), (1000, 1000, 3000, 2000))
    picture.paste((0, 0, 255, 255), (1000, 3000, 3000, 4000))
    picture.save(tmp_path / "large.png", compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path / "large.png"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 25 * 4000 * 5000
