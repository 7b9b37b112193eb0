"""Picture files are decoded and set upright, or refused in one line."""

import contextlib
import io
import os
import struct
import tempfile
import warnings
import zlib

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.control.images import load_image, load_layers
from runtime.errors import InputError
from tests.support.refusals import refusal


def picture(height=6, width=8, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image_format, **options):
    file = io.BytesIO()
    Image.fromarray(picture(24, 32)).save(file, format=image_format, **options)
    return file.getvalue()


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
    text = refusal(load_image, path, "condition")
    assert text.startswith(f"condition: {path} {expected}")


def test_a_tiff_of_other_pixels_is_not_called_unknown(tmp_path):
    for pixels in (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.float64)):
        assert cv2.imwrite(str(tmp_path / "a.tif"), pixels)
        said = refusal(load_image, tmp_path / "a.tif")
        assert "is a TIFF whose kind of pixels is not read; expected 8 or 16 bits" in said
    assert cv2.imwrite(str(tmp_path / "a.tif"), np.ones((8, 8), np.float32))
    assert load_image(tmp_path / "a.tif").getpixel((0, 0)) == 255


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
@pytest.mark.parametrize("opened", [False, True])
def test_a_tiff_whose_0_is_white(tmp_path, dtype, white, opened):
    path, columns = tmp_path / "mask.tif", np.array([[0, 0, white]] * 2, dtype)
    image = Image.fromarray(columns)
    image.save(path, tiffinfo={262: 0, 274: 3})  # WhiteIsZero, and turned by 180 degrees
    if dtype == np.uint8:  # Pillow turns these round as it writes them
        columns = white - columns
    pixels, _ = load_layers(Image.open(path) if opened else path)
    assert (pixels[0, 0].float() / pixels.max()).tolist() == ((white - columns[:, ::-1]) / white).tolist()


def test_folders_pipes_and_impossible_names(tmp_path):
    assert "is a folder; expected an image file" in refusal(load_image, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(load_image, tmp_path / "pipe")
    assert "cannot be read" in refusal(load_image, "a\0b.png")
    assert "cannot be read" in refusal(load_image, "x" * 5000)
    assert "cannot be read" in refusal(load_image, "~nobody-of-that-name/a.png")


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
    text = refusal(load_image, tmp_path / "bomb.png", "mask")
    assert text.startswith(f"mask: {tmp_path / 'bomb.png'} has too many pixels")
    assert f"{Image.MAX_IMAGE_PIXELS:,}" in text


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_a_bomb_is_refused_whatever_another_thread_makes_of_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9999)
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    opened, filters = Image.open, list(warnings.filters)

    def meanwhile(*arguments, **options):  # as another picture's end in a thread of its own restores them
        warnings.filters[:] = filters
        warnings._filters_mutated()
        return opened(*arguments, **options)

    monkeypatch.setattr(Image, "open", meanwhile)
    assert "has too many pixels" in refusal(load_image, tmp_path / "bomb.png")


def test_reading_a_picture_leaves_the_processs_warnings_alone(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")
    opened, seen = Image.open, []
    monkeypatch.setattr(Image, "open", lambda *a, **o: seen.append(list(warnings.filters)) or opened(*a, **o))
    load_image(tmp_path / "mask.png")
    assert seen == [list(warnings.filters)]


def test_a_bomb_in_the_header_alone_is_refused_before_decoding(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(data + struct.pack(">I", 100) + b"IDAT" + b"\0" * 100)
    assert "has too many pixels; expected at most 89,478,485" in refusal(load_image, tmp_path / "bomb.png")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (4, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == 255


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
