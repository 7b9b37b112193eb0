"""One process at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from runtime.errors import InputError, first_line

try:
    import fcntl
except ImportError:  # Windows: two processes at a time are not noticed
    fcntl = None

HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(path: Path, busy: str, wait: float = 0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the system frees it when its process ends, however that ends.

    wait: seconds to wait for another process to free it. Raises InputError "<busy> (process ... on ...)" where that
    holds it still, OSError where the file cannot be made. A file system without locks is a warning.
    """
    until = time.monotonic() + wait
    with open(path, "a+", encoding="utf-8") as file:
        while not _is_free(file, path):
            if time.monotonic() >= until:
                raise InputError(f"{busy} ({_holder(file)}); wait for its end, or stop it")
            time.sleep(0.1)
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield


@contextmanager
def owned(folder: Path, name: str) -> Iterator[Path]:
    """Yield a folder, made where there is none, that no other process owns while the block runs.

    Raises InputError, which begins with `name`, where another does, or where it cannot be one.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock", f"{name} {folder}: in use"))
        except OSError as error:
            raise InputError(f"{name} {folder}: {first_line(error)}; expected a folder") from error
        yield folder


def _is_free(file: TextIO, path: Path) -> bool:
    """Take the lock, if it is free; it ends with the file."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        said = f"{path}: this file system has no locks ({error.strerror}); do not use it from two processes"
        warnings.warn(said, stacklevel=4)
    return True


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        about = json.loads(file.read())
        return f"process {int(about['process'])} on {about['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
