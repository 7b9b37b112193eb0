"""Picture files: opened, decoded and set upright, or refused in one line."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from runtime.arguments import whole_number
from runtime.errors import InputError
from runtime.machine.files import file_kind, reason_of

# Named, since Pillow's others start programs (EPS) or are read by nobody's intention.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")


def formats() -> list[str]:
    """Return those of FORMATS that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(path: Path, name: str) -> Image.Image:
    """Return the picture of a file, see `decode`. Raises InputError where it cannot be read, naming it."""
    try:
        path = path.expanduser()
        kind = file_kind(path)
        if kind != stat.S_IFREG:
            found = {None: "does not exist", stat.S_IFDIR: "is a folder"}.get(kind, "is not a regular file")
            raise InputError(f"{name}: {path} {found}; expected an image file")
        if path.stat().st_size == 0:
            raise InputError(f"{name}: {path} is empty (0 bytes); expected an image file")
        with open(path, "rb") as file:
            return decode(file, name, str(path))
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL in the name, unknown ~user
        raise InputError(f"{name}: {path} cannot be read: {reason_of(error)}") from error


def decode(source, name: str, path: str = "the image") -> Image.Image:
    """Return the decoded and upright PIL image of an open file or of a (perhaps still undecoded) PIL image.

    Raises InputError where it is none, or has more pixels than PIL's `Image.MAX_IMAGE_PIXELS`, or the environment's
    LOCALCONTROL_MAX_PIXELS, by its header: before memory is taken.
    """
    if given := os.environ.get("LOCALCONTROL_MAX_PIXELS"):
        number = int(given) if given.isdecimal() and len(given) < 19 else given
        Image.MAX_IMAGE_PIXELS = whole_number(number, "LOCALCONTROL_MAX_PIXELS")
    try:
        image = source if isinstance(source, Image.Image) else _opened(source)
        _widen_transparency(image)
        image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise InputError(
            f"{name}: {path} has too many pixels; expected at most {limit} (LOCALCONTROL_MAX_PIXELS sets another limit)"
        ) from error
    except Image.UnidentifiedImageError as error:
        found, expected = "not an image in a known format", ", ".join(formats())
        if is_tiff(source):
            found, expected = (
                "a TIFF whose kind of pixels is not read",
                "8 or 16 bits, or one channel in float32",
            )
        raise InputError(f"{name}: {path} is {found}; expected {expected}") from error
    except Exception as error:  # on damaged data the decoders raise a dozen types, IndexError to struct.error
        raise InputError(f"{name}: {path} is damaged or truncated: {error}") from error
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # the picture itself is whole
        warnings.warn(f"{name}: {path}: its EXIF data are damaged, taken as upright: {error}", stacklevel=2)
        upright = image
    return _inverted(upright) if _white_is_0(image) else upright


def _white_is_0(image: Image.Image) -> bool:
    """Return whether 0 is white in a TIFF of more than 8 bits: of up to 8 Pillow has turned them round."""
    tags = getattr(image, "tag_v2", {})
    return image.mode in ("I;16", "F") and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _inverted(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    return Image.fromarray((1 if image.mode == "F" else 65535) - pixels)


def is_tiff(file) -> bool:
    """Return whether an open file begins as a TIFF does; Pillow calls one with other kinds of pixels unknown."""
    file.seek(0)
    return file.read(4) in (b"II*\0", b"MM\0*")


def _opened(source) -> Image.Image:
    """Return the picture of an open file, its pixels not read yet. Raises DecompressionBombError for too many.

    Pillow only warns of up to twice as many as its limit, and what becomes of a warning is the process's to say:
    another thread may be saying it.
    """
    image, limit = Image.open(source, formats=formats()), Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError
    return image


def _widen_transparency(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the 8 bits of its pixels, which Pillow compares with the file's own bits."""
    clear, bits = image.info.get("transparency"), image.tile[0][3] if getattr(image, "tile", None) else None
    if isinstance(clear, int) and bits == "1":  # so in Pillow before 12.3
        image.info["transparency"] = 255 if clear else 0
    elif isinstance(clear, int) and bits in ("L;2", "L;4"):
        image.info["transparency"] = clear * 255 // (3 if bits == "L;2" else 15)
    elif isinstance(clear, tuple) and bits == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)
