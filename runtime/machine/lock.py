"""One process at a time."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.errors import InputError


@contextmanager
def locked(path: Path, busy: str, wait: float = 0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the system frees it when its process ends, however that ends.

    wait: seconds to wait for another process to free it. Raises InputError "<busy> by process ... on ...; ..." where
    that holds it still. A file system without locks is a warning.
    """
    lock, holder = FileLock(path), path.with_name(path.name + ".holder")
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise InputError(f"{busy} by {_who(holder)}; wait for its end, or stop it") from error
    except (OSError, NotImplementedError) as error:
        said = f"{path}: this file system has no locks ({error}); do not use it from two processes"
        warnings.warn(said, stacklevel=3)
        yield
        return
    try:
        with suppress(OSError):
            holder.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}), "utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _who(holder: Path) -> str:
    try:
        about = json.loads(holder.read_text("utf-8"))
        return f"process {int(about['process'])} on {about['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
