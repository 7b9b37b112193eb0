"""Pictures out: whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.control.png import save_png
from runtime.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_png_keeps_pixels_and_metadata(tmp_path):
    text = {"prompt": "a red star", "note": "звезда 星 ★", "café": "crème", "broken": "a\udcffb"}
    save_png(Image.fromarray(PIXELS), tmp_path / "out.png", text)
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.array(image), PIXELS)
        assert image.text == {**text, "broken": "a?b"}
    assert os.listdir(tmp_path) == ["out.png"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o666 & ~umask


def interrupt(error):
    """A stand-in for `Path.write_bytes`, which writes a part and fails."""

    def write(path, data):
        with open(path, "wb") as file:
            file.write(data[:8])
        raise error

    return write


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), InputError)],
)
def test_a_failed_save_leaves_what_was_there(existed, error, raised, tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    if existed:
        path.write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", interrupt(error))
    with pytest.raises(raised):
        save_png(Image.new("L", (4, 4)), path)
    assert os.listdir(tmp_path) == (["out.png"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


def test_an_interruption_before_the_rename_leaves_nothing(tmp_path, monkeypatch):
    def replace(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_png(Image.new("L", (4, 4)), tmp_path / "out.png")
    assert os.listdir(tmp_path) == []


def test_a_symbolic_link_is_kept(tmp_path):
    (tmp_path / "target.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to(tmp_path / "target.png")
    save_png(Image.new("L", (4, 4)), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    with Image.open(tmp_path / "target.png") as image:
        assert image.size == (4, 4)


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="^output: cannot write"):
        save_png(Image.new("L", (4, 4)), tmp_path / "none" / "out.png")
