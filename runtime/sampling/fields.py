"""What the fields of a request must be: each converted to its type, or refused by its name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.errors import InputError


def read_negatives(negative: str | Sequence[str], count: int) -> tuple[str, ...]:
    """Return a negative prompt for each of `count` prompts."""
    texts = read_texts(negative, "negative_prompt")
    if isinstance(negative, str):
        return texts * count
    if len(texts) != count:
        raise InputError(
            f"negative_prompt: {len(texts)} texts for {count} prompts; expected one, or one for each"
        )
    return texts


def read_generators(given, seed: int | None, images: int) -> tuple[torch.Generator, ...] | None:
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


def read_texts(prompt: str | Sequence[str], name: str = "prompt") -> tuple[str, ...]:
    """Return the prompts. Raises InputError where they are no texts."""
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


def read_noise(latents) -> Tensor | None:
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
