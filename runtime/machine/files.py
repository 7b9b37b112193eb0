"""Files: written whole or not at all, JSON read and written."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.errors import InputError, first_line

ABANDONED = (
    3600.0  # seconds after which a dead process' file is nobody's: another container may have its number
)
CHUNK = 1 << 24  # bytes read at a time


def expand(path: str | os.PathLike, option: str = "") -> Path:
    """Return a path with ~ and ~user replaced. Raises InputError, naming `option`, where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{option} {path}: no such user; expected a path".strip()) from error


def check_writable(path, name: str = "output") -> Path:
    """Return the path, if a file can be written there, else InputError. To call before computing; leaves no trace."""
    try:
        path = Path(path).expanduser()
        kind = file_kind(path)
        if kind == stat.S_IFDIR:
            raise InputError(f"{name}: {path} is a folder; expected the name of a file to write")
        if kind is not None and not (kind == stat.S_IFREG and os.access(path, os.W_OK)):
            raise InputError(f"{name}: {path} cannot be replaced; expected a new or a writable regular file")
        folder = path.resolve().parent
        if not folder.is_dir():
            raise InputError(f"{name}: the folder {folder} does not exist; create it first")
        with tempfile.NamedTemporaryFile(dir=folder, prefix="."):
            pass
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, an unknown ~user
        raise InputError(f"{name}: cannot write {path}: {reason_of(error)}") from error
    return path


def file_kind(path: Path) -> int | None:
    """Return the file type bits of what is at the path (links followed), None if nothing is."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return None


def reason_of(error: Exception) -> str:
    """Return what an error says, of the system's without its number and the path."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def reads() -> Iterator[None]:
    """Have what the system says of a file or folder in this block, as that it may not be read, be an InputError."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # of no file: a network's
            raise
        raise InputError(
            f"{error.filename}: cannot be read: {reason_of(error)}; expected a file or folder that can"
        ) from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the name once the block has ended and all is on the disk.

    An exception, KeyboardInterrupt included, leaves the file that was there before, or none. A symbolic link
    keeps pointing at its target, and a file that is replaced its permissions. Raises OSError where the file cannot be
    written.
    """
    target = expand(path).resolve()
    partial = _partial(target)
    try:
        yield partial
        with suppress(OSError):  # there is none to replace, or it is somebody else's
            os.chmod(partial, stat.S_IMODE(target.stat().st_mode))
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Yield a folder beside `path` to fill; it takes the name, new or of an empty folder, once all in it is on the
    disk. replace: or that of a full one, which is there until then.

    An exception leaves nothing of it, and what was there; what a killed process leaves ends in ".part". Raises OSError
    where it cannot be written.
    """
    target = expand(path).resolve()
    partial, before = _partial(target), _partial(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        for entry in (*partial.rglob("*"), partial):
            sync(entry)
        if replace and target.exists():
            os.replace(target, before)
        os.replace(partial, target)
        sync(target.parent)
        remove(before)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if before.exists() and not target.exists():
            os.replace(before, target)
        remove(before)
        raise


def _partial(target: Path) -> Path:
    """Return a path beside `target` for what is not yet whole, once what killed processes left there is removed.

    Its name is short, whatever the target's is, and says whose it is: host and process.
    """
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    for left in target.parent.glob(f".{host}-*.part"):
        process, age = left.name.split("-")[1], 0.0
        with suppress(OSError):
            age = time.time() - left.stat().st_mtime
        if age > ABANDONED and process.isdecimal() and not _is_alive(int(process)):
            remove(left)
    return target.with_name(f".{host}-{os.getpid()}-{secrets.token_hex(8)}{target.suffix[:8]}.part")


def clear_partials(*folders: Path) -> None:
    """Remove what killed processes left half-written in folders that this process alone uses."""
    for folder in folders:
        for left in folder.glob(".*.part"):
            remove(left)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or a number that no process has
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def size_of(number: float) -> str:
    """Return bytes in words: "3.5 GB", "120 MB"."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    if os.name == "nt" and path.is_dir():  # cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, also those of folders that are links: models share their parts so."""
    for root, folders, names in os.walk(folder, followlinks=True):
        around = {os.path.realpath(each) for each in (root, *Path(root).parents)}  # a link to them has no end
        folders[:] = [name for name in folders if os.path.realpath(Path(root, name)) not in around]
        yield from (file for name in names if (file := Path(root, name)).is_file())


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes, in hexadecimal. Raises OSError where it cannot be read."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            sha.update(data)
    return sha.hexdigest()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's fields, for `json.loads`' object_pairs_hook. Raises ValueError, naming one given twice.

    By itself `json` keeps the last and says nothing of the others.
    """
    if (twice := first_repeated(name for name, _ in pairs)) is not None:
        raise ValueError(f"{twice!r} is given twice in an object; expected it once")
    return dict(pairs)


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that was there before; None where all are different."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def read_json(path: Path) -> dict:
    """Return a JSON object. Raises InputError where the file is missing, or is not one, or has a field twice."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        found = "missing" if is_missing else f"cannot be read: {reason_of(error)}"
        raise InputError(f"{path}: {found}, expected a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def write_json(data: dict, path: str | os.PathLike, name: str = "report") -> None:
    """Write a JSON file, complete or not at all; InputError names `name` where it cannot be written."""
    try:
        with replacing(path) as partial:
            partial.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise InputError(f"{name}: cannot write {path}: {error.strerror or error}") from error
