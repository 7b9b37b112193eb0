"""runtime.serve.files: pictures by the hash of their bytes, refused by their header, bounded."""

import base64
import hashlib
import os
import time
import zlib
from struct import pack

import pytest
from PIL import Image

from runtime.serve.files import Files
from runtime.serve.limits import Limits
from runtime.serve.refusals import Refusal
from tests.support.server import png

PICTURE = png(Image.new("RGB", (20, 10), "red"))


def files(folder, **limits):
    return Files(folder / "files", Limits(**limits))


def test_kept_once_and_found_by_its_hash(tmp_path):
    kept = files(tmp_path)
    name, image = kept.add(PICTURE)
    assert name == hashlib.sha256(PICTURE).hexdigest() and image.size == (20, 10)
    assert kept.add(PICTURE)[0] == name
    assert kept.read(name, "mask") == (name, PICTURE)
    assert [path.name for path in kept.folder.glob("*/*")] == [name]


@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "data:image/x-icon;base64,"])
def test_read_in_base64(tmp_path, head):
    name, data = files(tmp_path).read(head + base64.b64encode(PICTURE).decode(), "mask")
    assert data == PICTURE and name == hashlib.sha256(PICTURE).hexdigest()


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "../x", "file:///etc/passwd", "https://example.org/a.png", "~/a", "é"]
)
def test_a_path_or_an_address_is_none(tmp_path, text):
    with pytest.raises(Refusal) as caught:
        files(tmp_path).read(text, "regions.0.mask")
    assert caught.value.field == "regions.0.mask" and "expected a file's id" in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(Refusal) as caught:
        files(tmp_path).read("0" * 64, "mask")
    assert caught.value.status == 404


def bomb(width, height):
    """A PNG whose header promises more than its few bytes."""

    def chunk(kind, data):
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    head = pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data


@pytest.mark.parametrize(("width", "height"), [(4097, 1), (1, 4097), (4096, 4000), (60000, 60000), (0, 5)])
def test_too_large_by_its_header(tmp_path, width, height):
    with pytest.raises(Refusal) as caught:
        files(tmp_path).add(bomb(width, height))
    assert caught.value.status == 422
    if width == 60000:
        assert "too many pixels; expected at most 16 million" in str(caught.value)
    elif width:
        assert f"{width} x {height} px; expected at most 4096 a side and 16 million pixels" in str(
            caught.value
        )


@pytest.mark.parametrize("data", [b"", b"GIF8", b"%!PS-Adobe", b"<svg/>", PICTURE[:33], PICTURE[:50]])
def test_what_is_no_picture(tmp_path, data):
    kept = files(tmp_path)
    with pytest.raises(Refusal):
        kept.add(data)
    assert list(kept.folder.glob("*/*")) == []


def test_bounded_the_least_recently_used_go_first(tmp_path):
    kept, names = files(tmp_path, kept_mib=1), []
    for i in range(4):
        image = Image.frombytes("RGB", (330, 330), os.urandom(330 * 330 * 3))
        names.append(kept.add(png(image))[0])
        for name in names:
            path = kept._path(name)
            if path.exists():
                os.utime(path, (i, i) if name != names[0] else (time.time(), time.time()))
        os.utime(kept._path(names[-1]), (time.time() - 100 + i,) * 2)
    assert {path.name for path in kept.folder.glob("*/*")} == {names[0], names[3]}


def test_bounded_by_age(tmp_path):
    kept = files(tmp_path, kept_hours=1)
    name, _ = kept.add(PICTURE)
    os.utime(kept._path(name), (time.time() - 4000,) * 2)
    kept.clean()
    assert list(kept.folder.glob("*/*")) == []


def test_bounded_by_number(tmp_path):
    kept = files(tmp_path, files=10)
    for shade in range(30):
        kept.add(png(Image.new("L", (2, 2), shade)))
    assert 9 <= len(list(kept.folder.glob("*/*"))) <= 10
