"""A file is replaced whole or not at all."""

import json
import os
import stat

import pytest

from runtime.errors import InputError
from runtime.machine.files import (
    check_writable,
    files_below,
    new_folder,
    read_json,
    reads,
    replacing,
    size_of,
    write_json,
)


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


def test_a_field_that_is_there_twice_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "alpha_pattern": {"a": 1, "a": 2}}')
    with pytest.raises(InputError, match="adapter_config.json: not a JSON file: 'a' is given twice"):
        read_json(tmp_path / "adapter_config.json")


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


def test_a_folder_that_is_not_replaced_after_all_is_put_back(tmp_path, monkeypatch):
    target, replace = tmp_path / "checkpoint", os.replace
    target.mkdir()
    (target / "weights").write_text("old")

    def fail_once(source, to):
        if to == target:
            monkeypatch.setattr(os, "replace", replace)
            raise KeyboardInterrupt
        replace(source, to)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(KeyboardInterrupt), new_folder(target, replace=True) as partial:
        (partial / "weights").write_text("new")
    assert list(tmp_path.iterdir()) == [target] and (target / "weights").read_text() == "old"


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o640)
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_name_as_long_as_the_file_system_takes(tmp_path):
    for name in ("a" * 251 + ".png", "b" * 255):
        with replacing(tmp_path / name) as partial:
            partial.write_text("x")
        with new_folder(tmp_path / ("f" + name[1:])) as partial:
            (partial / "x").write_text("x")
        assert (tmp_path / name).read_text() == (tmp_path / ("f" + name[1:]) / "x").read_text()


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("a")
        host = partial.name.split("-")[0]
        assert partial.name.split("-")[1] == str(os.getpid())
    dead, alive, fresh = (tmp_path / f"{host}-{n}-ab.txt.part" for n in (2**22 + 1, os.getpid(), 2**22 + 2))
    folder, other = tmp_path / f"{host}-{2**22 + 1}-ab.part", tmp_path / ".01234567-1-ab.part"
    folder.mkdir()
    for path in (dead, alive, fresh, folder / "x", other):
        path.write_text("half")
    for path in (dead, alive, folder, other):
        os.utime(path, (1, 1))
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("b")
    assert not dead.exists() and not folder.exists()
    assert alive.exists() and fresh.exists() and other.exists()


def test_sizes_are_in_the_unit_that_they_have():
    assert [size_of(n) for n in (2e6, 999e6, 3.5e9)] == ["2 MB", "999 MB", "3.5 GB"]


def test_check_writable_accepts_new_and_old_files_and_leaves_no_trace(tmp_path, monkeypatch):
    assert check_writable(tmp_path / "new.png") == tmp_path / "new.png"
    assert os.listdir(tmp_path) == []
    (tmp_path / "old.png").write_bytes(b"old")
    check_writable(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"
    monkeypatch.chdir(tmp_path)
    check_writable("bare.png")


def test_check_writable_refuses_with_a_reason(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, expected in {
        tmp_path: "is a folder",
        "": "is a folder",
        tmp_path / "none" / "out.png": f"the folder {tmp_path / 'none'} does not exist",
        tmp_path / "file" / "out.png": "Not a directory",
        tmp_path / ("x" * 300): "File name too long",
        "a\0b": "cannot write",
        "/dev/null": "cannot be replaced",
        "/proc/out.png": "cannot write /proc/out.png",
    }.items():
        with pytest.raises(InputError, match="^--out: ") as caught:
            check_writable(path, "--out")
        assert expected in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_writable_refuses_read_only_folders_and_files(tmp_path):
    (tmp_path / "file.png").touch(mode=0o400)
    with pytest.raises(InputError, match="cannot be replaced"):
        check_writable(tmp_path / "file.png")
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        check_writable(tmp_path / "new.png")


def test_what_may_not_be_read_is_one_line_and_what_is_no_files_stays(tmp_path):
    for error in (PermissionError(13, "Permission denied", "a/b"), OSError(36, "File name too long", "a/b")):
        with pytest.raises(InputError, match=f"^a/b: cannot be read: {error.strerror}; expected "), reads():
            raise error
    with pytest.raises(ConnectionError), reads():
        raise ConnectionError("reset by peer")
    with pytest.raises(InputError, match=r"none\.json: missing, expected a JSON file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read: Is a directory, expected a JSON file"):
        read_json(tmp_path)


def test_files_of_folders_that_are_links_are_below_too(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "a.txt").touch()
    for name in ("one", "two"):
        (tmp_path / "folder" / name).symlink_to(tmp_path / "shared", target_is_directory=True)
    (tmp_path / "folder" / "around").symlink_to(tmp_path, target_is_directory=True)  # which has no end
    (tmp_path / "folder" / "nowhere").symlink_to(tmp_path / "missing")
    found = {path.relative_to(tmp_path / "folder").as_posix() for path in files_below(tmp_path / "folder")}
    assert found == {"one/a.txt", "two/a.txt"}
