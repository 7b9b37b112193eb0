"""A region: one control, where it acts, how strongly and when; and its packing into tensors."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from runtime.control import conditions, images, masks
from runtime.control.adapters import fit_channels
from runtime.control.fields import check
from runtime.control.keyframes import Keyframes
from runtime.control.rows import per_picture, spread
from runtime.errors import InputError


@dataclass(frozen=True, eq=False)
class Region:
    """One control, or words, or both, inside one mask.

    Attributes:
        condition: what the adapter sees (edges, a sketch, ...): PIL image, path, array or tensor. None: words alone.
        mask: where it acts, white = control: PIL image, path, array or tensor. None: everywhere. Either may be a list,
            or an array (N, H, W, C) or tensor (N, C, H, W): one for each picture of the call, or for each prompt.
        adapter: name of the adapter that reads the condition.
        scale: strength; any finite number; 0 adds nothing. Or keyframes, between which it is interpolated: pairs of
            (fraction of the denoising steps, value), or a text such as "0:1.0,0.5:0.3".
        start, end: the fractions of the denoising steps between which it acts, 0 <= start <= end <= 1. end may be
            keyframes too, of the share of its strength that is left: "0.5:1,0.8:0" fades out.
        levels: four factors on the scale, one for each level of the UNet, from the finest to the coarsest.
        mask_condition: also blank the condition where the mask is exactly 0, so that nothing of it there can
            reach the image, not even through the adapter's receptive field.
        prompt: words that take the place of the picture's prompt inside the mask, see `words`.
        prompt_weight: how much they do, 0 to 1, or keyframes: the rest is the picture's prompt.
        uncond_scale: the share of scale in the unguided half of classifier-free guidance; any finite number.
        preprocess: the condition to compute of the picture (see `conditions`), at the size of the picture to be made,
            where its lines have the width that adapters know. "none": the picture is a condition already.
        label: what messages call the region; its number in the list by default.

    Raises:
        InputError: a field outside its range; names the field and the value.
    """

    condition: Any = None
    mask: Any = None
    adapter: str = "canny"
    scale: float | Keyframes = 1.0
    start: float = 0.0
    end: float | Keyframes = 1.0
    levels: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    mask_condition: bool = False
    _: KW_ONLY
    prompt: str | None = None
    prompt_weight: float | Keyframes = 1.0
    uncond_scale: float = 1.0
    preprocess: str = "none"
    label: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        for name, value in check(vars(self), self.label or "region").items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(
        cls,
        fields: Mapping[str, Any],
        name: str = "region",
        base: str | os.PathLike | None = None,
    ) -> Region:
        """Return the region that a command line's or a JSON file's fields describe.

        Values may be strings ("0.5", levels "1,1,0.5,0" or "1:1:0.5:0", mask_condition "yes"); relative paths
        are resolved against the folder `base`. name: the region's label.

        Raises:
            InputError: unknown or missing keys and bad values; starts with `name`.
        """
        if not isinstance(fields, Mapping):
            raise InputError(
                f"{name}: {fields!r} is not a region; expected keys (condition, mask ...) and values"
            )
        known = [field.name for field in dataclasses.fields(cls) if field.name != "label"]
        unknown = [str(key) for key in fields if key not in known]
        if unknown:
            raise InputError(f"{name}: unknown key {', '.join(unknown)}; expected {', '.join(known)}")
        given = {
            key: value
            for key, value in fields.items()
            if not (value is None or (_is_blank(value) and key != "prompt"))
        }
        if "adapter" in given and "condition" not in given:
            raise InputError(f"{name}: adapter {given['adapter']!r} without a condition; expected a picture")
        for key in given.keys() & {"condition", "mask"}:
            if isinstance(given[key], (list, tuple)):
                raise InputError(f"{name}: {key} is a list; expected one picture")
            given[key] = _resolve(given[key], base)
        return cls(**given, label=name)

    def read(self, opened: dict[tuple, Any] | None = None) -> Region:
        """Return the region with its pictures decoded, each once: pictures of files as 8-bit PIL images.

        opened: what was read before, by its path: files that several regions name are decoded once.

        Raises:
            InputError: unreadable or NaN pictures, a missing depth model; starts with the label.
        """
        opened = {} if opened is None else opened
        try:
            conditions.check_preprocess(self.preprocess)
        except InputError as error:
            raise InputError(f"{self.label}: {error}") from error
        found = {}
        for field, reads in (("condition", images.load_image), ("mask", masks.read_mask)):
            read = [_read(source, name, reads, opened) for name, source in self.pictures(field)]
            found[field] = read if images.unbatched(getattr(self, field)) else next(iter(read), None)
        return dataclasses.replace(self, **found)

    def pictures(self, field: str) -> list[tuple[str, Any]]:
        """Return the pictures of `condition` or `mask`, each with what messages call it; none where it has none."""
        source = getattr(self, field)
        return [] if source is None else images.pictures(source, f"{self.label} {field}")


@dataclass(frozen=True, eq=False)
class PackedRegion:
    """A region's pictures, float32 in [0, 1]: condition (N, 1 | 3, H, W), mask (N, 1, H, W); each may be None.

    N is 1, or as long as the region's list, see `per_picture`.
    """

    condition: Tensor | None
    mask: Tensor | None
    region: Region


def pack(regions: Sequence[Region], height: int, width: int) -> list[PackedRegion]:
    """Read every region's pictures and resize them to height x width.

    Warns (UserWarning) where a picture is stretched to another aspect ratio and where a mask is all zero.

    Raises:
        InputError: unreadable or NaN pictures; says which region's.
    """
    return [_pack(region, height, width) for region in labelled(regions)]


def union(packed: Sequence[PackedRegion], height: int, width: int, pictures: int = 1) -> Tensor:
    """Return the largest of the regions' masks at each pixel, (1 | pictures, 1, H, W) float32; 0 without regions."""
    found = torch.zeros(1, 1, height, width)
    for item in packed:
        mask = torch.ones_like(found) if item.mask is None else per_picture(item.mask, pictures)
        found = torch.maximum(found, mask)
    return found


def pad_regions(packed: Sequence[PackedRegion], height: int, width: int) -> list[PackedRegion]:
    """Return regions at a larger size: to the right and below, conditions and masks go on as they end."""
    return [
        dataclasses.replace(
            item,
            condition=item.condition if item.condition is None else images.pad(item.condition, height, width),
            mask=item.mask if item.mask is None else images.pad(item.mask, height, width),
        )
        for item in packed
    ]


def labelled(regions: Sequence[Region]) -> list[Region]:
    """Return the regions; those that no command line or file has named are called by their number.

    Raises InputError where `regions` is not a sequence of regions.
    """
    if not isinstance(regions, (list, tuple)):
        raise InputError(f"regions: {type(regions).__name__}; expected a list of runtime.Region")
    for i, region in enumerate(regions):
        if not isinstance(region, Region):
            raise InputError(f"region {i + 1}: a {type(region).__name__}; expected a runtime.Region")
    return [
        dataclasses.replace(region, label=f"region {i + 1}") if region.label is None else region
        for i, region in enumerate(regions)
    ]


def _pack(region: Region, height: int, width: int) -> PackedRegion:
    painted = [(name, masks.read_mask(source, name)) for name, source in region.pictures("mask")]
    mask = _fitted_masks(region, painted, height, width)
    shown = [
        (name, _load_condition(region, source, name, height, width))
        for name, source in region.pictures("condition")
    ]
    if not shown:
        return PackedRegion(None, mask, region)
    hides = region.mask_condition and mask is not None
    if hides:
        # At the condition's own size first: resizing mixes pixels across the mask's edge.
        count = max(len(shown), len(painted))
        pairs = zip(spread(shown, count), spread(painted, count), strict=True)
        shown = [(name, _blanked(pixels, own)) for (name, pixels), (_, own) in pairs]
    fitted = [images.fit(pixels, height, width, name) for name, pixels in shown]
    colours = max(pixels.shape[1] for pixels in fitted)
    condition = torch.cat([fit_channels(pixels, colours) for pixels in fitted])
    if hides:
        condition = condition * (per_picture(mask, len(condition)) > 0)
    return PackedRegion(condition, mask, region)


def _fitted_masks(region: Region, painted: Sequence[tuple[str, Tensor]], height: int, width: int):
    """Return a region's masks at a size, (N, 1, height, width); None without any."""
    fitted = [images.fit(mask, height, width, name, mode="area") for name, mask in painted]
    for (name, _), mask in zip(painted, fitted, strict=True):
        if not mask.any():
            lost = "words" if region.condition is None else "control"
            warnings.warn(f"{name}: all zero (black), so the region has no {lost}", stacklevel=2)
    return torch.cat(fitted) if fitted else None


def _load_condition(region: Region, source, name: str, height: int, width: int) -> Tensor:
    """Return a condition at its own size; one that is computed of a picture at height x width."""
    if region.preprocess != "none":
        return images.to_tensor(_preprocess(region, source, name, height, width))
    condition = images.load_pixels(source, name)
    _hint(region, condition, name)
    images.warn_of_dark(condition, name)
    return condition


def _blanked(condition: Tensor, mask: Tensor) -> Tensor:
    return condition * (F.interpolate(mask, condition.shape[-2:], mode="area") > 0)


def _hint(region: Region, condition: Tensor, name: str) -> None:
    """Warn where an adapter of lines, which are white on black, is shown a drawing in black on white."""
    lines = any(word in region.adapter.lower() for word in ("canny", "sketch", "line", "edge", "scribble"))
    if not lines:
        return
    mean = sum(s.sum(dtype=torch.float64) for s in images.strips(condition)) / condition.numel()
    if mean > images.LIGHT and min(s.min() for s in images.strips(condition)) < 0.5:
        warnings.warn(
            f"{name}: dark lines on white; {region.adapter!r} knows white lines on black, and preprocess sketch "
            "draws them so",
            stacklevel=5,
        )


def _is_blank(value) -> bool:
    return isinstance(value, str) and not value.strip()


def _resolve(source, base: str | os.PathLike | None):
    if not isinstance(source, (str, os.PathLike)):
        return source
    try:
        return Path(base or "").expanduser() / Path(source).expanduser()
    except RuntimeError:  # an unknown ~user; the loader says so
        return source


def _read(source, name: str, reads: Callable, opened: dict[tuple, Any]):
    """Return a source as `reads` gives it; arrays and tensors are not rounded to 8 bits."""
    if not isinstance(source, (str, os.PathLike)):
        if reads is images.load_image and not isinstance(source, Image.Image):
            reads = images.load_tensor
        return reads(source, name)
    key = os.path.abspath(source), reads
    if key not in opened:
        opened[key] = reads(source, name)
    return opened[key]


def _preprocess(region: Region, source, name: str, height: int, width: int) -> Image.Image:
    """Return the condition of a picture, computed at height x width."""
    pixels = images.load_pixels(source, name)
    images.warn_of_dark(pixels, name)
    fitted = images.fit(pixels, height, width, name)
    try:
        return conditions.preprocess(region.preprocess, images.load_image(fitted))
    except InputError as error:
        raise InputError(f"{region.label}: {error}") from error
