"""The denoising loop and the schedulers it runs on, which are diffusers' own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kernels import ops
from runtime.errors import InputError
from runtime.sampling.denoiser import Step
from runtime.sampling.linear_steps import LinearSteps, linear_steps

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


def make_noise(
    shape: tuple[int, int, int, int], generators: Sequence[torch.Generator], latents: Tensor | None = None
) -> Tensor:
    """N(0, 1) noise, (B, C, h, w) float32 on the CPU, an image from each generator: the same in every batch.

    latents: noise to take instead; InputError where it has another shape, or values that are not finite.
    """
    if latents is None:
        return randn_tensor(shape, generator=list(generators), dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise InputError(f"latents: shape {tuple(latents.shape)}, expected {shape}")
    if not latents.isfinite().all():
        raise InputError("latents: NaN or infinite values, expected N(0, 1) noise")
    return latents.float()


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

    guidance, guidance_range: see `guided_steps`; a guided step takes a batch of 2B, negative rows first.
    generators: one for each image, for schedulers that draw noise: an image does not depend on its batch.
    progress: called with (steps done, steps) after every step.
    """
    latents = noise.float() * scheduler.init_noise_sigma
    linear = linear_steps(scheduler)
    if linear is not None:
        stepper = LinearStepper(linear, guidance, latents.device)
    else:
        stepper = SchedulerStepper(scheduler, guidance, generators)
    count = len(scheduler.timesteps)
    for i, guided in enumerate(guided_steps(guidance, guidance_range, count)):
        sample = stepper.scale(latents, i)
        if guided:
            sample = torch.cat([sample, sample])
        latents = stepper.advance(latents, step(sample, i), i)
        if progress is not None:
            progress(i + 1, count)
    return latents


def guided_steps(guidance: float, guidance_range: tuple[float, float], count: int) -> list[bool]:
    """Which of `count` steps run with classifier-free guidance, which is where `guidance` is above 1.

    guidance_range: the fractions of the steps between which it acts, as a region's start and end; the other steps see
    the prompt alone, at half the work (limited-interval guidance, arXiv 2404.07724).
    """
    start, end = map(float, guidance_range)
    return [guidance > 1 and start <= i / count and (i + 1) / count <= end for i in range(count)]


class LinearStepper:
    """Steps as numbers known beforehand: guidance and step in one pass, and no waiting for the device."""

    def __init__(self, steps: LinearSteps, guidance: float, device: torch.device):
        self.scales, self.coefficients = steps.scales.tolist(), steps.coefficients(guidance, device)
        self.remembers = bool(steps.numbers[:, -1].any())
        self.previous: Tensor | None = None

    def scale(self, latents: Tensor, i: int) -> Tensor:
        """The model's input at step i."""
        return latents * self.scales[i]

    def advance(self, latents: Tensor, output: Tensor, i: int) -> Tensor:
        """The latents after step i. output: as many rows, or twice as many, the unguided first."""
        latents, denoised = ops.guidance_step(latents, output, self.coefficients[i], self.previous)
        self.previous = denoised if self.remembers else None
        return latents


class SchedulerStepper:
    """The scheduler's own steps, see `LinearStepper`."""

    def __init__(self, scheduler: SchedulerMixin, guidance: float, generators: Sequence[torch.Generator]):
        self.scheduler, self.guidance = scheduler, guidance
        takes = inspect.signature(scheduler.step).parameters
        self.options = {"generator": list(generators)} if "generator" in takes else {}

    def scale(self, latents: Tensor, i: int) -> Tensor:
        return self.scheduler.scale_model_input(latents, self.scheduler.timesteps[i])

    def advance(self, latents: Tensor, output: Tensor, i: int) -> Tensor:
        if len(output) > len(latents):
            unguided, guided = output.chunk(2)
            output = unguided + self.guidance * (guided - unguided)
        t = self.scheduler.timesteps[i]
        return self.scheduler.step(output, t, latents, **self.options, return_dict=False)[0]
