"""training.embedded.scenes: an image folder to try the trainer on."""

import pytest
from PIL import Image

from training.embedded import scenes


def test_scenes_are_pictures_with_captions(tmp_path):
    assert scenes.main(["--out", str(tmp_path / "new"), "--count", "2"]) == 0
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["000000.png", "000000.txt", "000001.png", "000001.txt"]
    assert Image.open(tmp_path / "new" / "000001.png").size == (128, 128)


@pytest.mark.parametrize(
    ("out", "count", "said"),
    [
        ("out", "-3", "error: count -3: expected a whole number of at least 1"),
        ("out", "0", "error: count 0: expected a whole number of at least 1"),
        ("/dev/null/out", "3", "error: out /dev/null/out: cannot be written: Not a directory"),
    ],
)
def test_nothing_to_write_or_nowhere_is_one_line(out, count, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert scenes.main(["--out", out, "--count", count]) == 2
    assert capsys.readouterr().err == f"{said}\n" and not list(tmp_path.iterdir())
