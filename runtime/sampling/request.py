"""A request: all that a picture is asked for. Built by a call, a command line or a server; checked once, before a model
is loaded; handed on whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from runtime.arguments import fractions, real_number, whole_number
from runtime.control.images import load_image
from runtime.control.levels import SIZE_MULTIPLE, picture_side
from runtime.control.masks import RESIZES
from runtime.control.region import PackedRegion, Region, labelled, pack
from runtime.errors import InputError
from runtime.sampling.prompts import SYNTAXES, check_prompt

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

OUTPUTS = ("pil", "np", "pt", "latent")  # as diffusers' pipelines name them
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

    def __post_init__(self) -> None:
        self.prompts = _texts(self.prompt)
        self.negatives = _negatives(self.negative_prompt, len(self.prompts))
        for name, known in (("prompt_syntax", SYNTAXES), ("output_type", OUTPUTS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r}: expected {', '.join(known)}")
        for name, texts in (("prompt", self.prompts), ("negative_prompt", self.negatives)):
            for text in dict.fromkeys(texts):
                check_prompt(text, self.prompt_syntax, name)
        self.clip_skip = whole_number(self.clip_skip or 0, "clip_skip", 0)
        for name in ("images_per_prompt", "cache_interval"):
            most = MAX_IMAGES if name == "images_per_prompt" else None
            setattr(self, name, whole_number(getattr(self, name), name, most=most))
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
        if self.mask_resize not in RESIZES:
            raise InputError(f"mask_resize {self.mask_resize!r}: expected {' or '.join(RESIZES)}")
        if self.scheduler is not None:
            from runtime.sampling.schedulers import check_scheduler  # it imports diffusers

            check_scheduler(self.scheduler)
        self._check_start()
        self.latents = _noise(self.latents)
        self.generators = _generators(self.generator, self.seed, self.images)
        opened: dict = {}
        self.regions = tuple(region.read(opened) for region in labelled(self.regions))
        self._packed: tuple[tuple[int, int], list[PackedRegion]] | None = None

    def _check_start(self) -> None:
        """Read the picture to start from, and take its size where none is asked for."""
        self.strength = real_number(self.strength, "strength")
        if not 0 < self.strength <= 1:
            raise InputError(f"strength {self.strength:g}: expected a number above 0, up to 1")
        if self.image is None:
            if self.strength != 1:
                raise InputError(f"strength {self.strength:g} without an image to start from; expected 1")
            return
        self.image = load_image(self.image, "image").convert("RGB")
        if self.left == 0:
            needed = 1 / self.steps
            raise InputError(
                f"strength {self.strength:g}: none of {self.steps} steps is left; expected at least {needed:.3g}"
            )
        for name, side in zip(("width", "height"), self.image.size, strict=True):
            own = max(SIZE_MULTIPLE, side // SIZE_MULTIPLE * SIZE_MULTIPLE)
            setattr(self, name, getattr(self, name) or picture_side(own, f"image: {name}"))

    @property
    def left(self) -> int | None:
        """Return how many of the steps are run from the image, as diffusers count them; None without one."""
        return None if self.image is None else min(int(self.steps * self.strength), self.steps)

    @property
    def run_steps(self) -> int:
        """Return how many steps are run."""
        return self.steps if self.left is None else self.left

    @property
    def images(self) -> int:
        """Return how many pictures are drawn."""
        return len(self.prompts) * self.images_per_prompt

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


def _negatives(negative: str | Sequence[str], count: int) -> tuple[str, ...]:
    """Return a negative prompt for each of `count` prompts."""
    texts = _texts(negative, "negative_prompt")
    if isinstance(negative, str):
        return texts * count
    if len(texts) != count:
        raise InputError(
            f"negative_prompt: {len(texts)} texts for {count} prompts; expected one, or one for each"
        )
    return texts


def _generators(given, seed: int | None, images: int) -> tuple[torch.Generator, ...] | None:
    """Return the generators that were given: one for all pictures, or one for each."""
    if given is None:
        return None
    found = (given,) if isinstance(given, torch.Generator) else given
    if not isinstance(found, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in found):
        raise InputError(
            f"generator: a {type(given).__name__}; expected a torch.Generator, or a list of them"
        )
    if seed is not None:
        raise InputError("generator: given beside a seed; expected one of the two")
    if len(found) not in (1, images):
        raise InputError(f"generator: {len(found)} for {images} pictures; expected one, or one for each")
    return tuple(found)


def _texts(prompt: str | Sequence[str], name: str = "prompt") -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"{name} {prompt!r}: expected a text, or a list of texts")
    for text in prompts:
        check_text(text, name)
    return tuple(prompts)


def check_text(text: str, name: str) -> None:
    """Raise InputError for a text that is not Unicode, such as what a shell makes of broken UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown, place = text.encode("utf-8", "replace").decode("utf-8"), error.start + 1
        raise InputError(f"{name} {shown!r}: broken UTF-8 at character {place}; expected a text") from error


def _noise(latents) -> Tensor | None:
    """Return the given noise as float32. Raises InputError where it is not a tensor or array of finite numbers."""
    if latents is None:
        return None
    if isinstance(latents, np.ndarray) and latents.dtype.kind in "fiu":
        latents = torch.from_numpy(latents.astype(np.float32))
    if not isinstance(latents, Tensor):
        raise InputError(f"latents: a {type(latents).__name__}; expected a tensor of N(0, 1) noise")
    if not latents.is_floating_point() or latents.ndim != 4:
        found = f"{str(latents.dtype).removeprefix('torch.')} {tuple(latents.shape)}"
        raise InputError(f"latents: {found}; expected floats (B, C, h, w)")
    if not latents.isfinite().all():
        raise InputError("latents: NaN or infinite values; expected N(0, 1) noise")
    return latents.float()
