"""runtime.machine.lock: one process at a time, whatever ends it."""

import os
import subprocess
import sys
import warnings

import pytest
from filelock import FileLock

from runtime.errors import InputError
from runtime.machine.lock import locked

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
        with (
            pytest.raises(InputError, match=f"^out x: in use by process {other.pid} on .*; wait for its end"),
            locked(path, "out x: in use"),
        ):
            pass
        other.kill()
    with locked(path, "busy", wait=5):
        pass


def test_nothing_but_the_lock_is_left(tmp_path):
    with locked(tmp_path / "lock", "busy"):
        assert str(os.getpid()) in (tmp_path / "lock.holder").read_text()
    assert not (tmp_path / "lock.holder").exists()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def fails(self, timeout):
        raise NotImplementedError("flock")

    monkeypatch.setattr(FileLock, "acquire", fails)
    done = []
    with pytest.warns(UserWarning, match="this file system has no locks"), locked(tmp_path / "lock", "busy"):
        done.append(1)
    assert done


def test_no_warning_where_there_are_locks(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(tmp_path / "lock", "busy"):
            pass
