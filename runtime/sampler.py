"""The denoising loop and the schedulers it runs on, which are diffusers' own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from runtime.denoiser import Step
from runtime.errors import InputError

# name -> (diffusers' class, options on top of the model's own configuration)
SCHEDULERS: dict[str, tuple[str, dict]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}


def make_scheduler(choice: str | SchedulerMixin | None, default: SchedulerMixin) -> SchedulerMixin:
    """A fresh scheduler with the model's noise schedule.

    choice: a name of `SCHEDULERS`, the name of any scheduler class of diffusers, a scheduler (used with its own
    configuration), or None for the model's own. Raises InputError for a name that is neither.
    """
    if choice is None or isinstance(choice, SchedulerMixin):
        scheduler = default if choice is None else choice
        return type(scheduler).from_config(scheduler.config)
    scheduler_class, options = _find(choice)
    known = inspect.signature(scheduler_class.__init__).parameters
    config = {
        k: v for k, v in default.config.items() if k in known
    }  # the noise schedule and what else they share
    return scheduler_class.from_config(config, **options)


def check_name(choice: str | None) -> None:
    """InputError unless `make_scheduler` knows the name."""
    if choice is not None:
        _find(choice)


def _find(choice: str) -> tuple[type[SchedulerMixin], dict]:
    name, options = SCHEDULERS.get(str(choice).lower(), (str(choice), {}))
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        names = ", ".join(SCHEDULERS)
        raise InputError(
            f"scheduler {choice!r} is unknown; expected one of {names}, or a scheduler class of diffusers"
        )
    return scheduler_class, options


def set_timesteps(scheduler: SchedulerMixin, steps: int, device: torch.device) -> Tensor:
    """The timesteps of the run, (T,): `steps` of them, or what the scheduler makes of it (Heun: 2 steps - 1)."""
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        raise InputError(
            f"steps {steps}: {type(scheduler).__name__} refuses it: {' '.join(str(error).split())}"
        ) from error
    return scheduler.timesteps


def denoise(
    step: Step,
    scheduler: SchedulerMixin,
    noise: Tensor,
    guidance: float,
    generators: Sequence[torch.Generator],
    progress: Callable[[int, int], None] | None = None,
    guidance_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Run the scheduler over its timesteps: noise (B, C, h, w) N(0, 1) -> latents (B, C, h, w), float32.

    guidance: classifier-free guidance where above 1 (the step then takes a batch of 2B, negative rows first).
    guidance_range: the fractions of the steps between which it acts, as a region's start and end; the other steps see
    the prompt alone, B rows, at half the work (limited-interval guidance, arXiv 2404.07724).
    generators: one for each image, for schedulers that draw noise: an image does not depend on its batch.
    progress: called with (steps done, steps) after every step.
    """
    latents = noise.float() * scheduler.init_noise_sigma
    extra = _step_options(scheduler, list(generators))
    timesteps, (start, end) = scheduler.timesteps, guidance_range
    count = len(timesteps)
    for i, t in enumerate(timesteps):
        sample = scheduler.scale_model_input(latents, t)
        if guidance > 1 and start <= i / count and (i + 1) / count <= end:
            unguided, guided = step(torch.cat([sample, sample]), i).chunk(2)
            output = unguided + guidance * (guided - unguided)
        else:
            output = step(sample, i)
        latents = scheduler.step(output, t, latents, **extra, return_dict=False)[0]
        if progress is not None:
            progress(i + 1, count)
    return latents


def _step_options(scheduler: SchedulerMixin, generators: list[torch.Generator]) -> dict:
    """The generators, for a scheduler whose step draws noise."""
    takes = inspect.signature(scheduler.step).parameters
    return {"generator": generators} if "generator" in takes else {}
