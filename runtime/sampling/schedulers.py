"""The schedulers, which are diffusers' own, by name."""

from __future__ import annotations

import inspect

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from runtime.errors import InputError

# name -> (diffusers' class, options on top of the model's own configuration)
SCHEDULERS: dict[str, tuple[str, dict]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # SDXL-Lightning's
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
    """Return a fresh scheduler with the model's noise schedule.

    choice: a name of `SCHEDULERS`, the name of any scheduler class of diffusers, a scheduler (used with its own
    configuration), or None for the model's own. Raises InputError for any other name.
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


def check_scheduler(choice: str | SchedulerMixin) -> None:
    """Raise InputError unless `make_scheduler` takes it."""
    if not isinstance(choice, SchedulerMixin):
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
    """Set and return the timesteps of the run, (T,): `steps`, or what the scheduler makes of it (Heun: 2 steps - 1)."""
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        raise InputError(
            f"steps {steps}: {type(scheduler).__name__} refuses it: {' '.join(str(error).split())}"
        ) from error
    return scheduler.timesteps
