"""Training samples of WebDataset tars: files of one name make a sample.

The tars are read by Python's tarfile and not by the package webdataset, which runs what a URL says, takes a damaged
header for the end, and believes a declared size.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from runtime.errors import InputError, first_line
from runtime.machine.files import expand, unique
from training.config import TrainConfig
from training.data.cache import digest
from training.data.sample import IMAGES, LARGEST_FILE, Sample, column_named, decode_text, is_litter, stat_line

BLOCK = tarfile.BLOCKSIZE
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
OTHER_KINDS = {  # first bytes, in lower case
    b"\x1f\x8b": "compressed (gunzip it first)",
    b"\xfd7zxz": "compressed (unxz it first)",
    b"bzh": "compressed (bunzip2 it first)",
    b"\x28\xb5\x2f\xfd": "compressed (unzstd it first)",
    b"pk\x03\x04": "a zip archive",
    b"<!doctype": "a web page (download it again)",
    b"<html": "a web page (download it again)",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (git lfs pull fetches it)",
}
LARGEST_HEADER = 2**20  # bytes of a header's own records: names are kilobytes


class Member(tarfile.TarInfo):
    """A member whose header is not believed before its size was looked at."""

    def _proc_member(self, tar: tarfile.TarFile):
        if self.size < 0 or (self.type in HEADERS and self.size > LARGEST_HEADER):
            raise tarfile.ReadError(f"a header of {self.size:,} bytes at {self.offset:,}")
        return super()._proc_member(tar)


class TarSource:
    """Each sample has an image, and its caption in .txt, .caption, or under a key of .json."""

    def __init__(self, config: TrainConfig):
        self.config, self.unused = config, None
        self.tars = [expand(path) for path in _expanded(config.data)]
        for path in self.tars:
            if not path.is_file():
                raise InputError(f"data {config.data}: no such file: {path}")
            if not _is_whole(path):
                kind = _other_kind(path) or "cut off"
                raise InputError(f"data {config.data}: {path} is {kind}; expected a tar with its end")
        # what is read of them is kept, too: the list of samples with their captions, and each one's condition
        read = (config.caption_key, config.condition_from or "", config.mask_from or "")
        self.fingerprint = digest(*map(stat_line, self.tars), *read)

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        number = 0
        for path in self.tars:
            try:
                with tarfile.open(path, "r:", tarinfo=Member) as tar:
                    members = (m for m in tar if _is_data(m))
                    for name, group in groupby(members, key=lambda m: _split(m.name)[0]):
                        found = list(group)
                        if number % parts == part:
                            yield number, self._sample(name, found, tar, path)
                        number += 1
                    _check_end(tar)
            except (OSError, ValueError, EOFError, tarfile.TarError) as error:
                raise InputError(
                    f"data {self.config.data}: {path}: a broken tar: {first_line(error)}"
                ) from error

    def _sample(self, name: str, found: list[tarfile.TarInfo], tar: tarfile.TarFile, path: Path) -> Sample:
        config, members = self.config, {_split(m.name)[1]: m for m in found}
        if len(members) < len(found):
            return Sample(name, error="two files of one ending")
        apart = (config.condition_from, config.mask_from)
        image = next((e[1:] for e in IMAGES if e[1:] in members and e[1:] not in apart), None)
        try:
            for member in members.values():
                _check_member(member, path)
            wanted = _wanted(image, apart) & members.keys()
            files = {ending: tar.extractfile(members[ending]).read() for ending in wanted}
            caption = _caption(files, config.caption_key)
        except InputError as error:
            return Sample(name, error=str(error))
        condition, mask = (ending and files.get(ending, b"") for ending in apart)
        unused = tuple(m.name for ending, m in sorted(members.items()) if ending not in wanted)
        return Sample(name, files.get(image, b""), caption, condition, mask, unused=unused)


def _expanded(data: str) -> list[str]:
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise InputError(f"data {data}: needs the package braceexpand; pip install braceexpand") from error
    try:
        return [path for part in data.split("::") for path in braceexpand(part)]
    except ValueError as error:
        raise InputError(f"data {data}: {error}; expected braces such as {{000..009}}") from error


def _is_data(member: tarfile.TarInfo) -> bool:
    """Return whether it is a file; folders are implied by their files' names, and links are not followed."""
    if member.size < 0:  # as an extended header may say: tarfile would go back to where it was
        raise tarfile.ReadError(f"{member.name}: {member.size} bytes")
    return member.isfile() and not is_litter(member.name.removeprefix("./"))


def _split(name: str) -> tuple[str, str]:
    """Return a member's name up to its file's first dot, and what comes after, in lower case: WebDataset's rule."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _wanted(image: str | None, apart: tuple) -> set[str]:
    return {e for e in (image, *apart, "txt", "caption", "json") if e}


def _caption(files: dict[str, bytes], key: str) -> str | None:
    for ending in ("txt", "caption"):
        if ending in files:
            try:
                return decode_text(files[ending]).strip()
            except InputError as error:
                raise InputError(f"its .{ending}: {error}") from error
    if "json" not in files:
        return None
    try:
        fields = json.loads(decode_text(files["json"]), object_pairs_hook=unique)
    except (ValueError, RecursionError, InputError) as error:
        raise InputError(f"its .json: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise InputError("its .json: expected an object")
    return fields.get(column_named(key, fields))


def _check_member(member: tarfile.TarInfo, path: Path) -> None:
    """Raise InputError where a member's size is not that of what lies in the tar, or is larger than what is read."""
    if member.issparse():
        raise InputError(f"{member.name}: a sparse file, which is not read")
    if member.size > LARGEST_FILE:
        raise InputError(
            f"{member.name}: {member.size / 2**20:,.0f} MiB; expected at most {LARGEST_FILE >> 20}"
        )
    if member.offset_data + member.size > path.stat().st_size:
        raise tarfile.ReadError(f"unexpected end of data in {member.name}")


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError where tarfile stopped at something else than a tar's end: it takes a damaged header for one."""
    tar.fileobj.seek(tar.offset)
    at = tar.offset
    while block := tar.fileobj.read(BLOCK * 64):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header, or files after the end, at byte {at:,}")
        at += len(block)


def _other_kind(path: Path) -> str | None:
    """Return what a file is by its first bytes, where it is known and no tar."""
    with path.open("rb") as file:
        start = file.read(64)
    known = (kind for magic, kind in OTHER_KINDS.items() if start.lstrip().lower().startswith(magic))
    return next(known, None)


def _is_whole(tar: Path) -> bool:
    """Return whether it has a tar's end, two blocks of zeros; tarfile takes what is cut off between two files for
    whole.
    """
    with tar.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * BLOCK))
        return file.read() == bytes(2 * BLOCK)
