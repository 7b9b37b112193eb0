"""What a compiled graph takes: named tensors, and the range of sizes it was built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.errors import InputError

# What graphs take and give, named here alone; the manifest of an engine folder has these names.
IDS, STATES, POOLED = "ids", "states", "pooled"
CONDITION, STRENGTHS = "condition", "strengths"
SAMPLE, TIME, PREDICTION = "sample", "time", "prediction"
LATENTS, PIXELS, MOMENTS = "latents", "pixels", "moments"
KEY, VALUE, SHARES = "key_", "value_", "shares_"  # and a number: see `numbered`
LEVEL, MASK, RESIDUAL = "level_", "mask_", "residual_"

Range = tuple[int, int, int]  # smallest, usual (what the engine is tuned for), largest
GUIDANCE = {"both": (1, 2, 2), "always": (2, 2, 2), "never": (1, 1, 1)}  # rows of the UNet for each image


def numbered(kind: str, index: int) -> str:
    """Return the name of one of several ports of a kind: KEY, VALUE, SHARES, LEVEL, MASK or RESIDUAL."""
    return f"{kind}{index}"


@dataclass(frozen=True)
class Axis:
    """A dimension that follows a call's size: ceil(size / divisor), such as a latent's height."""

    # height, width, tokens (of a prompt), texts (of a picture), rows (of the UNet) or items (prompts, or pictures to
    # decode)
    name: str
    divisor: int = 1

    def __str__(self) -> str:
        return self.name if self.divisor == 1 else f"{self.name}/{self.divisor}"

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Return the axis of a text such as "height/8"."""
        name, _, divisor = text.partition("/")
        return cls(name, int(divisor or 1))

    def of(self, sizes: Mapping[str, int]) -> int:
        """Return its length in a call of these sizes."""
        return -(-sizes[self.name] // self.divisor)


def most_words(ports: Sequence[Port]) -> int | None:
    """Return how many regions' words a UNet of these ports takes; None for any number."""
    texts = next((port.shape[1] for port in ports if port.name.startswith(SHARES)), 1)
    return None if isinstance(texts, Axis) else texts - 1


Shape = tuple["int | Axis", ...]


@dataclass(frozen=True)
class Port:
    """A named input or output of a graph; `shape` has an `Axis` where the size depends on the call."""

    name: str
    dtype: torch.dtype
    shape: Shape

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return its shape in a call of these sizes."""
        return tuple(size.of(sizes) if isinstance(size, Axis) else size for size in self.shape)


@dataclass(frozen=True)
class Profile:
    """The sizes an engine accepts. An axis whose smallest and largest are equal is static in the graph.

    images: of a call. height, width: pixels, multiples of 16. guidance: whether the UNet sees two rows an image
    ("always"), one ("never"), or either ("both").
    """

    images: Range
    height: Range
    width: Range
    guidance: str = "both"

    def range(self, name: str) -> Range:
        """Smallest, usual and largest size of an axis, before its divisor."""
        if name == "items":  # any number up to the largest: prompts repeat, pictures are decoded in parts
            return (1, *self.images[1:])
        if name != "rows":
            return getattr(self, name)
        factors = GUIDANCE[self.guidance]
        return tuple(count * factor for count, factor in zip(self.images, factors, strict=True))

    def shapes(self, port: Port) -> tuple[tuple[int, ...], ...]:
        """Smallest, usual and largest shape of a port."""
        names = {size.name for size in port.shape if isinstance(size, Axis)}
        return tuple(port.sized({name: self.range(name)[i] for name in names}) for i in range(3))

    def is_dynamic(self, axis: Axis) -> bool:
        smallest, _, largest = self.range(axis.name)
        return smallest != largest

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise InputError, naming the size, where a call is outside what was built."""
        for name, size in sizes.items():
            smallest, _, largest = self.range(name)
            if smallest <= size <= largest:
                continue
            expected = str(smallest) if smallest == largest else f"{smallest} to {largest}"
            what = {"rows": "rows of the UNet (images, twice with guidance)", "items": "images"}.get(
                name, name
            )
            option = {"rows": "batch and --guidance", "items": "batch"}.get(name, name)
            raise InputError(
                f"{what} {size}: the engines were built for {expected}; rebuild with another --{option}"
            )
