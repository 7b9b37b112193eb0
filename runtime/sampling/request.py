"""A request: all that a picture is asked for. Built by a call, a command line or a server; checked once, before a model
is loaded; handed on whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.arguments import fractions, real_number, whole_number
from runtime.control.images import load_pixels, pictures
from runtime.control.levels import SIZE_MULTIPLE, picture_side
from runtime.control.masks import RESIZES
from runtime.control.profile import rgb_profile, warn_of_transparency
from runtime.control.region import PackedRegion, Region, labelled, pack
from runtime.errors import InputError
from runtime.sampling.fields import check_text, read_generators, read_negatives, read_noise, read_texts
from runtime.sampling.lists import batch, check_count, check_lists
from runtime.sampling.unused import warn_of_unused
from runtime.text.composition import Composition
from runtime.text.prompts import SYNTAXES, check_prompt, parse

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from runtime.sampling.held import Reference

OUTPUTS = ("pil", "np", "pt", "latent")  # as diffusers' pipelines name them
OUTSIDES = ("free", "held")
MAX_SEED = 2**63 - 1
MAX_IMAGES = 1000  # of one prompt
MAX_STEPS = 1000  # the noise levels that SDXL's schedule has


@dataclass(eq=False)
class Request:
    """What `LocalControlPipeline` draws; see its `__call__` for the fields. Lists of prompts become tuples.

    The regions' pictures are decoded here, once. Raises InputError, naming the field, where one is of the wrong type or
    outside its range, or a picture cannot be read.
    """

    prompt: str | Sequence[str]
    regions: Sequence[Region] = ()
    negative_prompt: str | Sequence[str] = ""
    height: int | None = None
    width: int | None = None
    steps: int = 30
    guidance: float = 5.0
    seed: int | None = None
    images_per_prompt: int = 1
    scheduler: str | SchedulerMixin | None = None
    latents: Tensor | None = None
    mask_resize: str = "area"
    guidance_range: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    cache_interval: int = 1
    prompt_syntax: str = "plain"
    clip_skip: int = 0
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    output_type: str = "pil"
    image: Any = None
    strength: float = 1.0
    outside: str = "free"
    reference: Reference | None = None

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_numbers()
        if self.scheduler is not None:
            from runtime.sampling.schedulers import check_scheduler  # it imports diffusers

            check_scheduler(self.scheduler)
        self._check_start()
        self.composition = Composition.of(self.prompts, self.prompt_syntax, self.images_per_prompt)
        self._check_composition()
        self.latents = read_noise(self.latents)
        self.generators = read_generators(self.generator, self.seed, self.images)
        opened: dict = {}
        self.regions = tuple(region.read(opened) for region in labelled(self.regions))
        self.words = tuple(region.prompt for region in self.regions if region.prompt is not None)
        for region in self.regions:
            self._check_region(region)
        self._check_outside()
        warn_of_unused(self)
        self._packed: tuple[tuple[int, int], list[PackedRegion]] | None = None

    def _check_texts(self) -> None:
        """Read the prompts, and what is said in words of how to take them."""
        self.prompts = read_texts(self.prompt)
        self.negatives = read_negatives(self.negative_prompt, len(self.prompts))
        known = {"prompt_syntax": SYNTAXES, "output_type": OUTPUTS, "outside": OUTSIDES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name} {getattr(self, name)!r}: expected {', '.join(values)}")
        if self.mask_resize not in RESIZES:
            raise InputError(f"mask_resize {self.mask_resize!r}: expected {' or '.join(RESIZES)}")
        for name, texts in (("prompt", self.prompts), ("negative_prompt", self.negatives)):
            for text in dict.fromkeys(texts):
                check_prompt(text, self.prompt_syntax, name, joins=name == "prompt")

    def _check_numbers(self) -> None:
        """Convert each number to its type, within its range."""
        self.clip_skip = whole_number(self.clip_skip or 0, "clip_skip", 0)
        self.images_per_prompt = whole_number(self.images_per_prompt, "images_per_prompt", most=MAX_IMAGES)
        self.cache_interval = whole_number(self.cache_interval, "cache_interval")
        self.steps = whole_number(self.steps, "steps", most=MAX_STEPS)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                setattr(self, name, picture_side(getattr(self, name), name))
        if self.seed is not None:
            self.seed = whole_number(self.seed, "seed", 0, MAX_SEED)
        self.guidance = real_number(self.guidance, "guidance")
        self.guidance_rescale = real_number(self.guidance_rescale, "guidance_rescale")
        if not 0 <= self.guidance_rescale <= 1:
            raise InputError(f"guidance_rescale {self.guidance_rescale:g}: expected a number from 0 to 1")
        self.guidance_range = fractions(self.guidance_range, "guidance_range")

    def _check_region(self, region: Region) -> None:
        """Check what a region asks for beside the rest of the request."""
        check_lists(region, len(self.prompts), self.images, not self.composition.plain)
        if region.uncond_scale != 1 and not any(self.guided_steps(self.run_steps)):
            raise InputError(
                f"{region.label}: uncond_scale {region.uncond_scale:g}: no step has guidance, and so an unguided "
                "half; expected guidance above 1"
            )
        if region.prompt is not None:
            check_text(region.prompt, f"{region.label}: prompt")
            check_prompt(region.prompt, self.prompt_syntax, f"{region.label}: prompt")
            if not any((part.text or "").strip() for part in parse(region.prompt, self.prompt_syntax)):
                raise InputError(f"{region.label}: prompt {region.prompt!r}; expected words")

    def _check_start(self) -> None:
        """Read the picture to start from, and take its size where none is asked for."""
        self.strength, self.profiles = real_number(self.strength, "strength"), []
        if not 0 < self.strength <= 1:
            raise InputError(f"strength {self.strength:g}: expected a number above 0, up to 1")
        if self.image is None:
            if self.strength != 1:
                raise InputError(f"strength {self.strength:g} without an image to start from; expected 1")
            return
        given = pictures(self.image, "image")
        check_count(len(given), "image", len(self.prompts), self.images)
        self.image = batch([(name, load_pixels(source, name)) for name, source in given])  # (N, 1 | 3, H, W)
        if self.outside == "held":  # whose pixels keep their meaning
            self.profiles = [rgb_profile(source) for _, source in given]
            for name, source in given:
                warn_of_transparency(source, name)
        if self.left == 0:
            needed = math.ceil(1e5 / self.steps) / 1e5  # rounded up: what is shown is enough
            raise InputError(
                f"strength {self.strength:g}: none of {self.steps} steps is left; expected at least {needed:g}"
            )
        (rows, columns), (height, width) = self.image.shape[2:], self.size(0)
        picture_side(height, "image: height"), picture_side(width, "image: width")
        # Each side is rounded by itself, by less than SIZE_MULTIPLE: one of them follows from the other.
        stretched = min(abs(width - columns * height / rows), abs(height - rows * width / columns))
        if (self.height or self.width) and stretched >= SIZE_MULTIPLE:
            raise InputError(
                f"image: {columns} x {rows} px, and the picture is {width} x {height}, of another aspect ratio; "
                "crop it, or leave height and width out"
            )

    def _check_composition(self) -> None:
        """Check that prompts which are composed have an unguided prediction to be composed with."""
        if not self.composition.plain and not all(self.guided_steps(self.run_steps)):
            raise InputError(
                "prompt: AND, and the weight of a whole prompt, count in steps with guidance alone; expected guidance "
                "above 1, and guidance_range 0 1"
            )

    def _check_outside(self) -> None:
        """Check what the outside is held to, and that there is one."""
        if self.reference is not None:
            from runtime.sampling.held import check_reference  # it imports diffusers

            check_reference(self.reference, self)
        for region in self.regions:
            if self.outside == "held" and region.mask is None:
                warnings.warn(
                    f"outside held: {region.label} has no mask, so nothing is outside", stacklevel=4
                )

    def size(self, side: float) -> tuple[int, int]:
        """Return the height and width that are computed, multiples of 16. side: of a picture whose size nothing says.

        By default an image's own: rounded down, to which it is resized, or up where the outside is held, since every
        one of its pixels is kept. Where one side is asked for, the other follows from the image's.
        """
        if self.image is None:
            return self.height or side, self.width or side
        rows, columns = self.image.shape[2:]
        if self.height or self.width:
            factor = self.height / rows if self.height else self.width / columns
            own = [max(1, round(x * factor / SIZE_MULTIPLE)) for x in (rows, columns)]
        elif self.outside == "held":
            own = [-(-x // SIZE_MULTIPLE) for x in (rows, columns)]
        else:
            own = [max(1, x // SIZE_MULTIPLE) for x in (rows, columns)]
        return self.height or own[0] * SIZE_MULTIPLE, self.width or own[1] * SIZE_MULTIPLE

    def picture_size(self, side: float) -> tuple[int, int]:
        """Return the height and width of the pictures: `size`, or those of an image of which every pixel is kept."""
        if self.image is None or self.outside != "held" or self.height or self.width:
            return self.size(side)
        return tuple(self.image.shape[2:])

    @property
    def left(self) -> int | None:
        """Return how many of the steps are run from the image, as diffusers count them; None without one."""
        return None if self.image is None else min(int(self.steps * self.strength), self.steps)

    @cached_property
    def run_steps(self) -> int:
        """Return how many steps are run: what a scheduler makes of `steps`. The model's own, not known yet: as many."""
        if self.scheduler is None:
            return self.steps if self.left is None else self.left
        from runtime.sampling.schedulers import count_steps  # it imports diffusers

        return count_steps(self.scheduler, self.steps, self.left)

    @property
    def draws_reference(self) -> bool:
        """Return whether the picture without control is drawn too, unless it is handed in."""
        return self.outside == "held" and self.image is None

    @property
    def images(self) -> int:
        """Return how many pictures are drawn."""
        return len(self.prompts) * self.images_per_prompt

    def rows(self, guided: bool) -> int:
        """Return how many rows of the UNet's batch a step takes, with guidance or without."""
        return len(self.composition.owners) + guided * self.images

    @property
    def most_rows(self) -> int:
        """Return how many rows the steps take at most."""
        return max(map(self.rows, self.guided_steps(self.run_steps)))

    def pack(self, height: int, width: int) -> list[PackedRegion]:
        """Return the regions' pictures at a size, see `region.pack`; computed once."""
        if self._packed is None or self._packed[0] != (height, width):
            self._packed = (height, width), pack(self.regions, height, width)
        return self._packed[1]

    def guided_steps(self, count: int) -> list[bool]:
        """Return which of `count` steps run with guidance, see `guided_steps`."""
        return guided_steps(self.guidance, self.guidance_range, count)


def guided_steps(guidance: float, guidance_range: tuple[float, float], count: int) -> list[bool]:
    """Return which of `count` steps run with classifier-free guidance, which is where `guidance` is above 1.

    guidance_range: the fractions of the steps between which it acts, as a region's start and end; the other steps see
    the prompt alone, at half the work (limited-interval guidance, arXiv 2404.07724).
    """
    start, end = guidance_range
    return [guidance > 1 and start <= i / count and (i + 1) / count <= end for i in range(count)]
