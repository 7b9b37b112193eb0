"""The schedulers, which are diffusers' own, by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from importlib.util import find_spec

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from runtime.errors import InputError, first_line
from runtime.loading.zero_snr import spelled_out

# noise levels, of which a scheduler has one kind
KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}
# name -> (diffusers' class, options on top of the model's own configuration)
SCHEDULERS: dict[str, tuple[str, dict]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # SDXL-Lightning's
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "euler_a_trailing": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),  # SDXL-Turbo's
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, **KARRAS},
    ),
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}


OTHER_SCHEDULE = {"snr_shift_scale"}  # an option of one that does not fit: CogVideoX' own shift
NOISE_SCHEDULE = {
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
}  # options of a scheduler that SDXL fits


def make_scheduler(choice: str | SchedulerMixin | None, default: SchedulerMixin) -> SchedulerMixin:
    """Return a fresh scheduler with the model's noise schedule.

    choice: a name of `SCHEDULERS`, the name of any scheduler class of diffusers, a scheduler (used with its own
    configuration), or None for the model's own. Raises InputError for any other name.
    """
    if choice is None or isinstance(choice, SchedulerMixin):
        scheduler = default if choice is None else choice
        _check_kind(type(scheduler), type(scheduler).__name__)
        config = scheduler.config if choice is not None else spelled_out(type(scheduler), scheduler.config)
        return _made(type(scheduler), config)
    scheduler_class, options = _find(choice)
    known = inspect.signature(scheduler_class.__init__).parameters
    config = {
        k: v for k, v in spelled_out(scheduler_class, default.config).items() if k in known
    }  # the noise schedule and what else they share
    return _made(scheduler_class, config, **options)


def _made(scheduler_class: type[SchedulerMixin], config: Mapping, **options) -> SchedulerMixin:
    try:
        return scheduler_class.from_config(config, **options)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise _refusal(scheduler_class, "its options", error) from error


def _refusal(scheduler_class: type[SchedulerMixin], what: str, error: Exception) -> InputError:
    """Return the error that says what diffusers' scheduler does not do, in its own words."""
    return InputError(f"scheduler {scheduler_class.__name__}: it refuses {what}: {first_line(error)}")


def check_scheduler(choice: str | SchedulerMixin) -> None:
    """Raise InputError unless `make_scheduler` takes it."""
    if not isinstance(choice, SchedulerMixin):
        _find(choice)


def _find(choice: str) -> tuple[type[SchedulerMixin], dict]:
    name, options = SCHEDULERS.get(str(choice).lower(), (str(choice), {}))
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if missing := [package for package in getattr(found, "_backends", ()) if find_spec(package) is None]:
        raise InputError(
            f"scheduler {choice!r} needs the package {missing[0]}; install it: pip install {missing[0]}"
        )
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        names = ", ".join(SCHEDULERS)
        raise InputError(
            f"scheduler {choice!r} is unknown; expected one of {names}, or a scheduler class of diffusers"
        )
    _check_kind(found, str(choice))
    return found, options


def _check_kind(scheduler_class: type[SchedulerMixin], choice: str) -> None:
    """Raise InputError for a scheduler that does not denoise, or not by a schedule of betas as SDXL's."""
    step = inspect.signature(getattr(scheduler_class, "step", _no_step)).parameters.values()
    asked = [p.name for p in step if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    options = inspect.signature(scheduler_class.__init__).parameters
    fits = options.keys() >= NOISE_SCHEDULE and not options.keys() & OTHER_SCHEDULE and len(asked) == 4
    if not fits or "Inverse" in scheduler_class.__name__:
        raise InputError(
            f"scheduler {choice!r} is for models of another kind; expected one for SDXL, such as euler"
        )


def _no_step(self): ...


def set_timesteps(
    scheduler: SchedulerMixin, steps: int, device: torch.device, left: int | None = None
) -> Tensor:
    """Set the timesteps and return those of the run, (T,): `steps`, or what the scheduler makes of it.

    (Heun makes 2 steps - 1.) left: how many of the steps, the last ones, are run from a picture (see `Request.left`);
    None is a run from noise.
    """
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        name, reason = type(scheduler).__name__, " ".join(str(error).split())
        if "broadcast" in reason:  # numpy's words say nothing to a user
            reason = "too few for its kind of steps"
        raise InputError(f"steps {steps}: {name} refuses it: {reason}") from error
    begin = 0 if left is None else (steps - left) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # also of 0: the first two noise levels may share one timestep
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def count_steps(choice: str | SchedulerMixin, steps: int, left: int | None = None) -> int:
    """Return how many steps a scheduler makes of `steps` with SDXL's schedule, see `set_timesteps`."""
    try:
        scheduler = make_scheduler(choice, diffusers.EulerDiscreteScheduler(steps_offset=1))
        return len(set_timesteps(scheduler, steps, torch.device("cpu"), left))
    except InputError:  # which the model's own schedule may allow: the run says so otherwise
        return steps if left is None else left


def copy_on_cpu(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a copy that can be asked without the device: all that it keeps is on the CPU."""
    asked = copy.deepcopy(scheduler)
    for name, value in vars(asked).items():  # `add_noise` leaves some where the latents are
        if isinstance(value, Tensor):
            setattr(asked, name, value.cpu())
    return asked


def rehearse(scheduler: SchedulerMixin) -> None:
    """Raise InputError where a scheduler takes no step, which some options show only there: before anything is run.

    Its timesteps are set; it stays as it is.
    """
    asked, latents = copy_on_cpu(scheduler), torch.zeros(1, 4, 1, 1)
    takes = inspect.signature(asked.step).parameters
    options = {"generator": torch.Generator()} if "generator" in takes else {}  # the process's stays as it is
    if hasattr(asked, "set_begin_index"):  # a run from a picture begins later
        asked.set_begin_index(0)
    first = asked.timesteps[0]
    try:
        asked.step(latents, first, asked.scale_model_input(latents, first), **options)
    except (ValueError, NotImplementedError, TypeError, RuntimeError) as error:
        raise _refusal(type(scheduler), "a step", error) from error


def noise_levels(scheduler: SchedulerMixin, timesteps: Tensor) -> list[tuple[float, float]]:
    """Return alpha and sigma of a run's latents, alpha z0 + sigma eps, before each step and after the last, which
    leaves no noise: T + 1 pairs. timesteps: the last ones of the scheduler's, (T,).

    diffusers' scheduler is asked, by adding noise of 0 to 1, and of 1 to 0.
    """
    asked = copy_on_cpu(scheduler)
    begin, ones = (
        len(scheduler.timesteps) - len(timesteps),
        torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1),
    )
    found = []
    for i, timestep in enumerate(timesteps.cpu()):
        if hasattr(asked, "set_begin_index"):
            asked.set_begin_index(begin + i)  # a timestep alone may stand for two noise levels
        alpha, sigma = asked.add_noise(ones[:, :1], ones[:, 1:], timestep.repeat(2)).flatten().tolist()
        if i % 2 and hasattr(asked, "sigmas_interpol"):
            sigma = _between(asked, timestep)
        found.append((alpha, sigma))
    return [*found, (1.0, 0.0)]


def _between(scheduler: SchedulerMixin, timestep: Tensor) -> float:
    """Return the noise level between two others at which KDPM2 is in the middle of a step, by what it divides by."""
    asked = copy.deepcopy(scheduler)
    asked.sample = torch.ones(1, dtype=torch.float64)  # of a step that is half done
    return (asked.scale_model_input(asked.sample, timestep).item() ** -2 - 1) ** 0.5
