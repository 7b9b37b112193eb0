"""runtime.control.images: everything a user may hand over is read alike, or refused in one line that names it."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.control.images import fit, load_image, load_layers, load_tensor, to_tensor
from runtime.errors import InputError
from tests.support.tolerances import assert_close


def picture(height=6, width=8, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image_format, **options):
    file = io.BytesIO()
    Image.fromarray(picture(24, 32)).save(file, format=image_format, **options)
    return file.getvalue()


def message(call, *arguments, **options):
    """The one line of the InputError that the call must raise."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (4, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == 255


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
    ("content", "expected"),
    [
        (None, "does not exist"),
        (b"", "is empty (0 bytes)"),
        (b"no picture at all", "is not an image"),
        (encoded("PNG")[:200], "is damaged or truncated"),
        (encoded("JPEG")[:500], "is damaged or truncated"),
    ],
    ids=["missing", "empty", "text", "truncated png", "truncated jpeg"],
)
def test_bad_files_are_named(content, expected, tmp_path):
    path = tmp_path / "photo.png"
    if content is not None:
        path.write_bytes(content)
    text = message(load_image, path, "condition")
    assert text.startswith(f"condition: {path} {expected}")


def test_folders_pipes_and_impossible_names(tmp_path):
    assert "is a folder; expected an image file" in message(load_image, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in message(load_image, tmp_path / "pipe")
    assert "cannot be read" in message(load_image, "a\0b.png")
    assert "cannot be read" in message(load_image, "x" * 5000)
    assert "cannot be read" in message(load_image, "~nobody-of-that-name/a.png")


@given(cut=st.integers(0, 400), position=st.integers(0, 400), byte=st.integers(0, 255))
@settings(max_examples=25)
def test_damaged_files_give_a_picture_or_an_input_error(cut, position, byte):
    for image_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        data = bytearray(encoded(image_format))
        data[position % len(data)] = byte
        with tempfile.NamedTemporaryFile() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of damaged metadata
            file.write(data[: len(data) - cut])
            file.flush()
            with contextlib.suppress(InputError):
                assert load_image(file.name).mode in ("L", "RGB")


@pytest.mark.parametrize("pixels_over_the_limit", [1.5, 100], ids=["PIL warns", "PIL raises"])
def test_decompression_bombs_are_refused_with_the_limit(pixels_over_the_limit, tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / pixels_over_the_limit))
    text = message(load_image, tmp_path / "bomb.png", "mask")
    assert text.startswith(f"mask: {tmp_path / 'bomb.png'} has too many pixels")
    assert f"{Image.MAX_IMAGE_PIXELS:,}" in text


def test_a_bomb_in_the_header_alone_is_refused_before_decoding(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(data + struct.pack(">I", 100) + b"IDAT" + b"\0" * 100)
    assert "has too many pixels; expected at most 89,478,485" in message(load_image, tmp_path / "bomb.png")


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
        text = message(load, source, "region 2 condition")
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


def test_the_environment_sets_the_most_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setenv("LOCALCONTROL_MAX_PIXELS", "1599")
    with pytest.raises(InputError, match="too many pixels; expected at most 1,599"):
        load_image(tmp_path / "a.png")
    monkeypatch.setenv("LOCALCONTROL_MAX_PIXELS", "1600")
    assert load_image(tmp_path / "a.png").size == (40, 40)
    monkeypatch.setenv("LOCALCONTROL_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="LOCALCONTROL_MAX_PIXELS 'many': expected a whole number"):
        load_image(tmp_path / "a.png")


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


def transparent_png(kind: int, bits: int, row: bytes, width: int, clear: bytes) -> io.BytesIO:
    """A PNG of one row, of colour type `kind`, of which the colour `clear` is transparent."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": clear, b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks.items()))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_found_at_every_depth(bits):
    """Optimizers write such: of few greys, or of 16 bits, Pillow itself finds none or cuts the values at 255."""
    last = 2**bits - 1
    for clear in {0, last, last // 3}:
        row = [0, last, last // 3, last, 0, 0, last, last // 3]
        text = "".join(format(value, f"0{bits}b") for value in row)
        data = int(text, 2).to_bytes(len(text) // 8, "big")
        colour, alpha = load_layers(Image.open(transparent_png(0, bits, data, 8, struct.pack(">H", clear))))
        largest = 255 if colour.dtype == torch.uint8 else 1
        expected = [value / last for value in row]
        np.testing.assert_allclose((colour[0, 0, 0].double() / largest).numpy(), expected, atol=1e-6)
        assert (alpha[0, 0, 0] / largest).tolist() == [float(value != clear) for value in row]


def test_a_transparent_colour_of_16_bits_is_found():
    clear, other = struct.pack(">HHH", 0x1234, 65535, 7), struct.pack(">HHH", 65535, 65535, 0)
    _, alpha = load_layers(Image.open(transparent_png(2, 16, clear + other, 2, clear)))
    assert alpha.flatten().tolist() == [0, 255]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_data_do_not_cost_the_picture(image_format):
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, image_format, exif=b"Exif\0\0no TIFF header")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_image(Image.open(file), "condition").size == (8, 6)
    said = [str(warning.message) for warning in caught]
    assert image_format == "JPEG" or any(
        "its EXIF data are damaged, taken as upright" in text for text in said
    )
