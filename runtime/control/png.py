"""Pictures out: as PNG, all or nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image, PngImagePlugin

from runtime.errors import InputError
from runtime.machine.files import reason_of, replacing


def save_png(image: Image.Image, path, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG with `metadata` as text chunks (iTXt where a value is not latin-1), all or nothing.

    The file appears under its name only once it is complete and on the disk: an interruption or a full disk
    leaves the file that was there before, or none. A symbolic link keeps pointing at its target.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_bytes(png_bytes(image, metadata))
    except OSError as error:
        raise InputError(f"output: cannot write {path}: {reason_of(error)}") from error


def png_bytes(image: Image.Image, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a PNG with `metadata` as text chunks, see `save_png`."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in (metadata or {}).items():  # lone surrogates, from a shell's broken UTF-8, become "?"
        info.add_text(key, str(value).encode("utf-8", "replace").decode("utf-8"))
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()
