"""runtime.machine.lock: one process at a time, whatever ends it."""

import errno
import os
import subprocess
import sys
import warnings

import pytest

from runtime.errors import InputError
from runtime.machine import lock
from runtime.machine.lock import locked, owned

HOLD = """
import pathlib, sys, time
from runtime.machine.lock import locked
with locked(pathlib.Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_frees_what_it_held(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        said = rf"^out x: in use \(process {other.pid} on .*\); wait for its end"
        for _ in range(2):  # asking does not spoil the answer
            with pytest.raises(InputError, match=said), locked(path, "out x: in use"):
                pass
        other.kill()
    with locked(path, "busy", wait=5):
        assert str(os.getpid()) in path.read_text()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", fails)
    done = []
    with pytest.warns(UserWarning, match="this file system has no locks"), locked(tmp_path / "lock", "busy"):
        done.append(1)
    assert done


def test_no_warning_where_there_are_locks(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(tmp_path / "lock", "busy"):
            pass


def test_a_folder_has_one_owner(tmp_path):
    folder = tmp_path / "new" / "folder"
    with owned(folder, "--data") as given:
        assert given == folder and folder.is_dir()
        with pytest.raises(InputError, match=rf"^--data {folder}: in use \(process"), owned(folder, "--data"):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder"), owned(tmp_path / "file", "--data"):
        pass


def test_an_error_of_the_block_is_none_of_the_folder(tmp_path):
    with pytest.raises(OSError, match="address in use"), owned(tmp_path, "--data"):
        raise OSError("address in use")
