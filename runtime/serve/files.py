"""Pictures that clients have sent: kept under the SHA-256 of their bytes, so that a mask travels once."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image

from runtime.control.image_files import decode, formats
from runtime.errors import InputError
from runtime.machine.files import replacing
from runtime.serve.limits import MIB, Limits
from runtime.serve.refusals import Refusal

NAME = re.compile(r"[0-9a-f]{64}")
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.I)
EXPECTED = "expected a file's id (POST /v1/files), or a picture in base64"


class Files:
    """A folder of pictures by their hashes, bounded by bytes and age; the least recently used go first."""

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder, limits
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._bytes = self._count = 0  # at most what is kept
        self.clean()

    def add(self, data: bytes, field: str = "file", status: int = 422) -> tuple[str, Image.Image]:
        """Keep a picture's bytes. Returns their hash and the picture. Raises Refusal where it is none, or too large."""
        image = self.open(data, field, status)
        name = hashlib.sha256(data).hexdigest()
        path = self._path(name)
        with self._lock:
            path.parent.mkdir(exist_ok=True)
            if not self._touched(path):
                with replacing(path) as partial:
                    partial.write_bytes(data)
                self._bytes, self._count = self._bytes + len(data), self._count + 1
            if self._bytes > self.limits.kept_mib * MIB or self._count > self.limits.files:
                self._clean(path)
        return name, image

    def read(self, text: str, field: str) -> tuple[str, bytes]:
        """Return the hash and the bytes of a file that a request names, or brings in base64.

        Raises Refusal, naming `field`.
        """
        if not NAME.fullmatch(text):
            data = from_base64(text, field)
            return hashlib.sha256(data).hexdigest(), data
        try:
            data = self._path(text).read_bytes()
        except OSError:
            message = f"{field}: no file {text[:12]}...; expected the id of one that POST /v1/files has kept"
            raise Refusal(404, message, field) from None
        self._touched(self._path(text))
        return text, data

    def open(self, data: bytes, field: str, status: int = 422) -> Image.Image:
        """Return the decoded picture. Its size is checked first, by its header. Raises Refusal, naming `field`."""
        try:
            image = Image.open(io.BytesIO(data), formats=formats())
        except Image.DecompressionBombError:
            message = f"{field}: too many pixels; expected at most {self.limits.megapixels:g} million"
            raise Refusal(422, message, field) from None
        except Exception as error:  # the decoders raise a dozen types on foreign data
            message = f"{field}: not a picture in a known format; expected {', '.join(formats())}"
            raise Refusal(status, message, field) from error
        check_size(*image.size, field, self.limits)
        try:
            return decode(image, field)
        except InputError as error:
            raise Refusal(status, str(error), field) from error

    def clean(self) -> None:
        """Remove what is too old, and the least recently used of what is too much."""
        with self._lock:
            self._clean()

    def _clean(self, keep: Path | None = None) -> None:
        """Remove down to nine tenths of what may be kept, so that it is not done at every file. keep: the newest."""
        kept, oldest = [], time.time() - self.limits.kept_hours * 3600
        for path in self.folder.glob("*/*"):
            with suppress(OSError):
                about = path.stat()
                kept.append((about.st_mtime, about.st_size, path))
        total, count = sum(size for _, size, _ in kept), len(kept)
        full = total > self.limits.kept_mib * MIB or count > self.limits.files
        share = 0.9 if full else 1.0
        for changed, size, path in sorted(kept):
            many = total > share * self.limits.kept_mib * MIB or count > share * self.limits.files
            if path != keep and (changed < oldest or many):
                with suppress(OSError):
                    path.unlink()
                    total, count = total - size, count - 1
        self._bytes, self._count = total, count

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    @staticmethod
    def _touched(path: Path) -> bool:
        """Note that a file is used, if it is there."""
        try:
            os.utime(path)
        except OSError:
            return False
        return True


def from_base64(text: str, field: str) -> bytes:
    """Return the bytes of a data URL or of bare base64. Raises Refusal, naming `field`, for anything else."""
    found = DATA_URL.match(text)
    try:
        return base64.b64decode(text[found.end() if found else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, f"{field} {text[:40]!r}: {EXPECTED}", field) from None


def check_size(width: int, height: int, field: str, limits: Limits) -> None:
    """Raise Refusal, naming the field, where a picture is larger than the server takes."""
    if max(width, height) > limits.side or width * height > limits.megapixels * 1e6:
        message = (
            f"{field}: {width} x {height} px; expected at most {limits.side} a side and "
            f"{limits.megapixels:g} million pixels"
        )
        raise Refusal(422, message, field)
