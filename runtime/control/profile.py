"""What a picture's file says of its pixels, which a picture made of them has to say too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from runtime.control.image_files import formats
from runtime.control.images import load_layers, strips

SPACE = slice(16, 20)  # of a profile's header: the kind of colours that it is of


def rgb_profile(source) -> bytes | None:
    """Return the ICC profile of a source that `images.load_image` has read; None where it has none of RGB."""
    with _header(source) as image:
        found = None if image is None else image.info.get("icc_profile")
    return found if found and found[SPACE] == b"RGB " else None  # grey and CMYK are RGB by then


def warn_of_transparency(source, name: str) -> None:
    """Warn where a source has pixels that are not opaque: they will be."""
    with _header(source) as image:
        if image is not None and not image.has_transparency_data:
            return  # found without its pixels
    _, alpha = load_layers(source, name)
    if alpha is not None and any(bool((a < 1).any()) for a in strips(alpha)):
        warnings.warn(
            f"outside held: {name} has transparency, which is laid on one colour; the picture made has none",
            stacklevel=5,
        )


@contextmanager
def _header(source) -> Iterator[Image.Image | None]:
    """Yield a source as Pillow opens it, its pixels not read yet; None where it is an array or a tensor."""
    if isinstance(source, (str, os.PathLike)):
        with Image.open(Path(source).expanduser(), formats=formats()) as image:
            yield image
    else:
        yield source if isinstance(source, Image.Image) else None
