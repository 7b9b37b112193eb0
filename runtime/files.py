"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name once the block has ended and all is on the disk.

    An exception, KeyboardInterrupt included, leaves the file that was there before, or none. A symbolic link
    keeps pointing at its target. Raises OSError where the file cannot be written.
    """
    target = Path(path).expanduser().resolve()
    partial = target.with_name(f".{secrets.token_hex(8)}{target.suffix}.part")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
