"""A training sample as it lies on the disk, and the words and names that data sets use."""

from __future__ import annotations

import codecs
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

from runtime.errors import InputError

IMAGES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif",
)  # fmt: skip
LARGEST_FILE = 2**30  # bytes of one picture or caption, which is read whole
# What file managers, archivers and notebooks leave behind; and whatever is hidden.
LITTER = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
SPELLINGS = {  # of a column, where the option has its default
    "text": ("text", "caption", "captions", "prompt"),
    "image": ("image", "img", "file_name", "image_file_name"),
}
MARKS = (  # at the start of a text, the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


@dataclass(frozen=True)
class Sample:
    """One sample as it lies on the disk: files' bytes. `error` says why there are none.

    unused: names of files of the sample that nothing reads.
    """

    name: str
    image: bytes = b""
    caption: str | None = None
    condition: bytes | None = None
    mask: bytes | None = None
    error: str | None = None
    unused: tuple[str, ...] = ()


class Source(Protocol):
    """fingerprint: changes when the data does, as far as can be told without reading it all.

    unused: what lies there and is not used, "path: why" each; None where only reading tells.
    """

    fingerprint: str
    unused: list[str] | None

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        """Samples part, part + parts, part + 2 parts, ... with their numbers."""


def is_litter(path: str | PurePath) -> bool:
    """Return whether a path within a data set is nobody's data: hidden, or left behind by a program."""
    parts = (part for part in PurePath(path).parts if part != "..")  # which leads to a place and hides none
    return any(part.startswith(".") or part.lower() in LITTER for part in parts)


def inside(data: Path, folder: Path, name: str) -> str | None:
    """Return the absolute path of a name in a folder of the data, None where it leads out of the data.

    By the name alone: links in the data are followed wherever they lead.
    """
    path = os.path.normpath(os.path.join(os.path.abspath(folder), name))
    return path if path.startswith(os.path.abspath(data) + os.sep) else None


def decode_text(data: bytes) -> str:
    """Return a text in the encoding that its byte order mark names, otherwise UTF-8, without the mark.

    Raises InputError where it is in another encoding.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"not {encoding.removesuffix('-sig')} from byte {error.start}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise InputError("has NUL characters, as UTF-16 without its mark does; save it as UTF-8")
    return text


def column_named(option: str, columns: Collection[str]) -> str:
    """Return the column that an option names; where it has its default, the first known spelling that is there."""
    return next((name for name in SPELLINGS.get(option, ()) if name in columns), option)


def stat_line(path: Path) -> str:
    """Return what changes with a file, without reading it: where it is, its size and times."""
    try:
        s = path.stat()
    except OSError:
        return f"{path} gone"
    # the time of the change of status cannot be set back, as the other can
    return f"{path} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
