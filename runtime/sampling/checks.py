"""What a call of the pipeline is refused for: its arguments, and results that are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import ops
from runtime.errors import InputError

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000  # the noise levels that SDXL's schedule has


def check_backend(backend: str) -> None:
    """InputError where the kernels' backend is unknown or cannot run here."""
    try:
        with ops.use_backend(backend):
            pass
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error


def check_call(
    prompts,
    negative_prompt,
    steps,
    guidance,
    seed,
    images_per_prompt,
    guidance_range=(0, 1),
    cache_interval=1,
) -> None:
    """InputError, naming the argument, where one is of the wrong type or outside its range."""
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"prompt {prompts}: expected a text, or a list of texts")
    if not isinstance(negative_prompt, str):
        raise InputError(f"negative_prompt {negative_prompt!r}: expected a text")
    counts = {"steps": steps, "images_per_prompt": images_per_prompt, "cache_interval": cache_interval}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} {value!r}: expected a whole number of at least 1")
    if steps > MAX_STEPS:
        raise InputError(
            f"steps {steps}: expected at most {MAX_STEPS}, the noise levels of the model's schedule"
        )
    if not math.isfinite(guidance):
        raise InputError(f"guidance {guidance}: expected a finite number")
    try:
        start, end = map(float, guidance_range)
    except (TypeError, ValueError) as error:
        raise InputError(f"guidance_range {guidance_range!r}: expected two fractions of the steps") from error
    if not 0 <= start <= end <= 1:
        raise InputError(f"guidance_range {start:g} to {end:g}: expected 0 <= start <= end <= 1")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed {seed}: expected a whole number from 0 to {MAX_SEED}")


def check_finite(tensor: Tensor, stage: str, dtype: torch.dtype) -> None:
    if not torch.isfinite(tensor).all():
        name = str(dtype).removeprefix("torch.")
        advice = "" if dtype == torch.float32 else "; try dtype fp32"
        raise InputError(f"{stage}: the result has NaN or infinite values (computed in {name}){advice}")
