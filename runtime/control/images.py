"""Pictures in: read what a user may hand over, refuse the rest in one line."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from runtime.control.image_files import decode, open_image
from runtime.errors import InputError

ASPECT_TOLERANCE = 0.02  # rounding a photograph's sides to multiples of 16 stays below it
RANGE_TOLERANCE = 1e-4  # a resampled array may leave [0, 1] by rounding
STRIP = 256  # rows
DARK = 16 / 255  # of a condition: what is brighter can be meant so
LIGHT = 0.75  # mean brightness from which what is drawn on a transparent layer is meant for a dark background


def unbatched(source) -> list | None:
    """Return the pictures of a list, or of an array (N, H, W, C) or tensor (N, C, H, W); None of a single picture."""
    if isinstance(source, (list, tuple)):
        return list(source)
    array = isinstance(source, np.ndarray) or (isinstance(source, Tensor) and source.layout == torch.strided)
    return list(source) if array and source.ndim == 4 and len(source) != 1 else None


def pictures(source, name: str) -> list[tuple[str, Any]]:
    """Return a source's pictures, see `unbatched`, each with what messages call it. Raises InputError for none."""
    several = unbatched(source)
    if several is None:
        return [(name, source)]
    if not several:
        raise InputError(f"{name}: an empty list; expected a picture, or one for each that is drawn")
    return [(f"{name} {i}" if len(several) > 1 else name, one) for i, one in enumerate(several, 1)]


def load_image(source, name: str = "image", background: str = "auto") -> Image.Image:
    """Read `source` as an 8-bit picture, mode "L" (grey) or "RGB", upright and without transparency.

    `source` is a PIL image, a path, an array (H, W), (H, W, C) or (1, H, W, C), or a tensor (H, W), (C, H, W) or
    (1, C, H, W), with C = 1, 3 or 4; values are uint8, uint16, bool, or float in [0, 1]. EXIF orientation is
    applied, transparency is laid on `background` ("white", "black", or "auto": black under what is drawn in a light
    colour, white otherwise), 16-bit and float pictures are scaled
    to 8 bits, and of an animation the first frame counts. Grey pictures stay grey; all others become RGB.

    Raises:
        InputError: missing, empty, damaged or foreign files, more pixels than PIL's `Image.MAX_IMAGE_PIXELS`,
            NaN, wrong shapes, types or ranges; names `name` and the path.
    """
    if isinstance(source, (str, os.PathLike)):
        image = open_image(Path(source), name)
    elif isinstance(source, Image.Image):
        image = decode(source, name)
    else:
        pixels = (_from_array(source, name)[0] * 255).round().to(torch.uint8).numpy()
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1).copy())
    return _to_8_bits(image, name, background)


def load_tensor(source, name: str = "image", background: str = "auto") -> Tensor:
    """Read as `load_image` does, but return (1, C, H, W) float32 in [0, 1], C = 1 or 3; arrays are not rounded to 8
    bits.
    """
    return unit(load_pixels(source, name, background))


def load_pixels(source, name: str = "image", background: str = "auto") -> Tensor:
    """Read as `load_tensor` does, but leave pictures of 8 bits in uint8: a quarter of the memory."""
    if isinstance(source, (str, os.PathLike, Image.Image)):
        return _bytes(load_image(source, name, background))
    tensor = _from_array(source, name)
    if tensor.shape[1] == 4:
        colour, alpha = tensor[:, :3], tensor[:, 3:]
        light = pick_background(colour, alpha) if background == "auto" else background
        tensor = colour * alpha + (1 - alpha) * (1.0 if light == "white" else 0.0)
    return tensor


def load_layers(source, name: str = "image") -> tuple[Tensor, Tensor | None]:
    """Read as `load_pixels` does, but return colour (1, 1 | 3, H, W) and alpha (1, 1, H, W), None without any."""
    if isinstance(source, (str, os.PathLike)):
        source = open_image(Path(source), name)
    if isinstance(source, Image.Image):
        source = decode(source, name)
        deep = _deep(source, name)
        if deep is None and not source.has_transparency_data:
            return _bytes(_to_8_bits(source, name, "white")), None
        tensor = _bytes(_with_alpha(source)) if deep is None else _from_array(deep, name)
    else:
        tensor = _from_array(source, name)
    return (tensor, None) if tensor.shape[1] != 4 else (tensor[:, :3], tensor[:, 3:])


def pick_background(colour: Tensor, alpha: Tensor) -> str:
    """Return "black" where what is drawn, (1, 3, H, W) with its alpha (1, 1, H, W), is light; otherwise "white"."""
    pairs = [
        ((c * a).sum().double(), a.sum().double()) for c, a in zip(strips(colour), strips(alpha), strict=True)
    ]
    light, drawn = (sum(values) for values in zip(*pairs, strict=True))
    return "black" if drawn > 0 and light / (3 * drawn) >= LIGHT else "white"


def warn_of_dark(pixels: Tensor, name: str) -> None:
    """Warn of a picture that is black to the eye and not to the computer: 0 and 1 of 255, 8 bits in 16."""
    largest = max(rows.max() for rows in strips(pixels)).item()
    if 0 < largest < DARK:
        warnings.warn(
            f"{name}: nearly black, its brightest value is {largest * 255:.2g} of 255; expected white, 255 "
            "(in 16 bits 65535)",
            stacklevel=5,
        )


def to_tensor(image: Image.Image) -> Tensor:
    """Return (1, C, H, W) float32 in [0, 1] of a picture of mode "L" (C = 1) or "RGB" (C = 3)."""
    return unit(_bytes(image))


def unit(pixels: Tensor) -> Tensor:
    """Return float32 in [0, 1] of pixels in uint8; floats as they are."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def strips(pixels: Tensor) -> Iterator[Tensor]:
    """Yield `unit` of STRIP rows of (1, C, H, W) at a time: of a large picture all at once would be gigabytes."""
    return (unit(rows) for rows in pixels.split(STRIP, dim=2))


def fit(image: Tensor, height: int, width: int, name: str = "image", mode: str = "bilinear") -> Tensor:
    """Resize (1, C, H0, W0), uint8 or float32, to (1, C, height, width) float32.

    Stretches with a warning if the aspect ratio differs. "bilinear" is antialiased; "area" averages all pixels that
    an output pixel touches, so that one over zeros only is exactly 0.
    """
    rows, columns = image.shape[-2:]
    if (rows, columns) == (height, width):
        return unit(image)
    if abs(columns * height / (rows * width) - 1) > ASPECT_TOLERANCE:
        warnings.warn(
            f"{name}: {columns} x {rows} px is stretched to {width} x {height}, another aspect ratio",
            stacklevel=2,
        )
    options = {"mode": "area"} if mode == "area" else {"mode": "bilinear", "antialias": True}
    channels = (unit(channel) for channel in image.split(1, dim=1))  # one in float32 at a time
    return torch.cat([F.interpolate(c, (height, width), **options) for c in channels], dim=1).clamp(0, 1)


def pad(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return (1, C, H, W) at a larger size: its last row and column go on to the right and below."""
    return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]), mode="replicate")


def _deep(image: Image.Image, name: str) -> np.ndarray | None:
    """Return the grey (H, W), or with alpha (H, W, 4), of a picture with more than 8 bits; None of any other."""
    if min(image.size) == 0:
        raise InputError(f"{name}: the image is {image.width} x {image.height} px; expected at least 1 x 1")
    if image.mode == "F":
        return np.asarray(image)
    if not image.mode.startswith("I"):  # 16-bit grey is "I;16", or from some formats the 32-bit "I"
        return None
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"{name}: values from {pixels.min()} to {pixels.max()}; expected 0 to 65535")
    pixels, clear = pixels.astype(np.uint16), image.info.get("transparency")
    if isinstance(clear, int):  # Pillow would cut all values at 255
        pixels = np.dstack([pixels] * 3 + [np.where(pixels == clear, 0, 65535).astype(np.uint16)])
    return pixels


def _to_8_bits(image: Image.Image, name: str, background: str) -> Image.Image:
    if (deep := _deep(image, name)) is not None:
        if deep.dtype == np.uint16 and deep.ndim == 2 and 0 < deep.max() < 128:
            warnings.warn(
                f"{name}: black in 8 bits, its brightest value is {deep.max()} of 65535; expected white, 65535",
                stacklevel=4,
            )
        return load_image(deep, name, background)
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = _with_alpha(image)
        if background == "auto":
            pixels = _bytes(image)
            background = pick_background(pixels[:, :3], pixels[:, 3:])
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert(mode)


def _bytes(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).reshape(1, image.height, image.width, -1)
    return pixels.permute(0, 3, 1, 2).contiguous()


def _with_alpha(image: Image.Image) -> Image.Image:
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


def _from_array(source, name: str) -> Tensor:
    """Return (1, C, H, W) float32 in [0, 1], C = 1, 3 or 4; arrays have their channels last, tensors first."""
    if isinstance(source, Tensor):
        expected = "a tensor (H, W), (C, H, W) or (1, C, H, W) with C = 1, 3 or 4"
        if source.layout != torch.strided or source.is_meta or source.is_quantized:
            kind = "meta" if source.is_meta else str(source.layout).removeprefix("torch.")
            raise InputError(f"{name}: a tensor of kind {kind}; expected a dense one, with values")
        tensor = source.detach().cpu()
        tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    elif isinstance(source, np.ndarray):
        expected = "an array (H, W), (H, W, C) or (1, H, W, C) with C = 1, 3 or 4"
        if source.dtype.kind not in "biuf":
            raise InputError(f"{name}: values of type {source.dtype}; expected uint8, or float in [0, 1]")
        if np.ma.is_masked(source):
            raise InputError(
                f"{name}: an array with masked values; expected plain ones, such as filled(0) gives"
            )
        native = np.float32 if source.dtype.kind == "f" else source.dtype.newbyteorder("=")
        tensor = torch.from_numpy(source.astype(native))
        tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
        tensor = tensor.movedim(-1, 0) if tensor.ndim == 3 else tensor
    else:
        kind = type(source).__name__
        raise InputError(
            f"{name}: a {kind} is not an image; expected a path, a PIL image, an array or a tensor"
        )
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    if tensor.ndim != 3 or len(tensor) not in (1, 3, 4) or tensor.numel() == 0:
        raise InputError(f"{name}: shape {tuple(source.shape)}; expected {expected}")
    return _to_unit_range(tensor, name)[None].contiguous()


def _to_unit_range(values: Tensor, name: str) -> Tensor:
    """float32 in [0, 1]: unsigned integers over their type's largest value, floats as they are."""
    if values.dtype in (torch.uint8, torch.uint16):
        return values.float() / torch.iinfo(values.dtype).max
    if values.dtype == torch.bool:
        return values.float()
    if not values.is_floating_point():
        raise InputError(f"{name}: values of type {values.dtype}; expected uint8, or float in [0, 1]")
    values = values.float()
    if not torch.isfinite(values).all():
        raise InputError(f"{name}: contains NaN or infinity; expected finite values in [0, 1]")
    low, high = values.min().item(), values.max().item()
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise InputError(f"{name}: values from {low:g} to {high:g}; expected uint8, or float in [0, 1]")
    return values.clamp(0, 1)
