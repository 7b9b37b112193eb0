"""A file is replaced whole or not at all."""

import json
import os

import pytest

from runtime.errors import InputError
from runtime.machine.files import replacing, write_json


def test_takes_the_place_of_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path  # the same file system
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, SystemExit])
def test_an_interruption_keeps_the_old_one(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with replacing(path) as partial:
            partial.write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_keeps_pointing_at_its_target(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_writes_json(tmp_path):
    write_json({"a": [1, "é"]}, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text("utf-8")) == {"a": [1, "é"]}
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_an_interruption_keeps_the_old_report(tmp_path, monkeypatch, failure):
    path = tmp_path / "r.json"
    path.write_text("old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(failure):
        write_json({"a": 1}, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_folder_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="report: cannot write"):
        write_json({}, tmp_path / "no" / "r.json")
