"""The denoising loop."""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kernels import ops, reference
from runtime.errors import Cancelled, InputError
from runtime.sampling.linear_steps import LinearSteps, linear_steps
from runtime.sampling.pixels import noised
from runtime.sampling.request import guided_steps
from runtime.sampling.schedulers import noise_levels
from runtime.sampling.torch_step import Step
from runtime.text.composition import Composer, Composition

AfterStep = Callable[[Tensor, int], Tensor]  # (latents after a step, its index) -> latents
# Called after a step with the latents, and with what gives the z0 that the step has predicted
Note = Callable[[Tensor, Callable[[], Tensor]], object]


def make_noise(
    shape: tuple[int, int, int, int], generators: Sequence[torch.Generator], latents: Tensor | None = None
) -> Tensor:
    """Return N(0, 1) noise, (B, C, h, w) float32, an image from each generator: the same in every batch.

    One generator for several images draws them all at once, as diffusers' pipelines do. A generator's noise comes from
    its own device.
    latents: noise to take instead. Raises InputError where it has another shape.
    """
    if latents is None:
        return randn_tensor(shape, _shared(generators), generators[0].device, torch.float32)
    if tuple(latents.shape) != shape:
        raise InputError(f"latents: shape {tuple(latents.shape)}, expected {shape}")
    return latents


def _shared(generators: Sequence[torch.Generator]) -> torch.Generator | list[torch.Generator]:
    """Return them as diffusers takes them: a list is one for each image."""
    return generators[0] if len(generators) == 1 else list(generators)


class Run:
    """One request's way through its steps: what the model is given at each, and what becomes of its answer.

    latents: (B, C, h, w) float32. index: of the next step, `count` at the end.
    """

    def __init__(
        self,
        step: Step,
        scheduler: SchedulerMixin,
        noise: Tensor,
        guidance: float,
        generators: Sequence[torch.Generator],
        on_step: Note | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        timesteps: Tensor | None = None,
        start: Tensor | None = None,
        after_step: AfterStep | None = None,
        cancelled: threading.Event | None = None,
        composition: Composition | None = None,
    ):
        """noise: (B, C, h, w) N(0, 1), with which it begins at the scheduler's first timestep.

        guidance, guidance_range: see `request.guided_steps`; a guided step takes a batch of 2B, negative rows first.
        rescale: how far the guided prediction is brought to the spread of the prompt's own, 0 to 1 (arXiv 2305.08891).
        generators: one for each image or for all, for schedulers that draw noise: an image does not depend on its
        batch. on_step: see `Note`. timesteps: the last ones of the scheduler's, all by default. start: latents
        (B, C, h, w) of a picture, from which the run starts, with the noise of the first timestep. after_step: what
        makes of the latents after a step those that the next one takes. cancelled: once it is set, no step is run.
        composition: of pictures that have several prompts each, at which every step is guided.
        """
        timesteps = scheduler.timesteps if timesteps is None else timesteps
        self.step, self.on_step, self.after_step, self.cancelled = step, on_step, after_step, cancelled
        self.count, self.index = len(timesteps), 0
        self.guided = guided_steps(guidance, guidance_range, self.count)
        self.composer = None if composition is None else Composer(composition, noise.device)
        linear = linear_steps(scheduler, timesteps)
        if start is None:
            self.latents = noise.float() * scheduler.init_noise_sigma
        else:
            self.latents = noised(start, noise.float(), scheduler, timesteps)
        if linear is not None:
            self.stepper = LinearStepper(linear, guidance, self.latents.device, rescale)
        else:
            shown = on_step is not None
            self.stepper = SchedulerStepper(scheduler, guidance, generators, rescale, timesteps, shown)

    @property
    def done(self) -> bool:
        """Return whether no step is left."""
        return self.index == self.count

    @property
    def rows(self) -> int:
        """Return how many rows of the model's batch the next step takes."""
        if self.composer is not None:
            return len(self.latents) + len(self.composer.owners)
        return len(self.latents) * (1 + self.guided[self.index])

    def sample(self) -> Tensor:
        """Return what the model is given at the next step, (rows, C, h, w). Raises Cancelled where it was."""
        self._check()
        sample = self.stepper.scale(self.latents, self.index)
        if self.composer is not None:
            return self.composer.rows(sample)
        return torch.cat([sample, sample]) if self.guided[self.index] else sample

    def advance(self, output: Tensor) -> None:
        """Take the step that the model's output (rows, C, h, w) is for."""
        if self.composer is not None:
            output = self.composer.combine(output)
        latents = self.stepper.advance(self.latents, output, self.index)
        self.latents = latents if self.after_step is None else self.after_step(latents, self.index)
        self.index += 1
        if self.on_step is not None:
            self.on_step(self.latents, self.stepper.denoised())
            self._check()

    def _check(self) -> None:
        if self.cancelled is not None and self.cancelled.is_set():
            raise Cancelled(f"cancelled after step {self.index} of {self.count}")

    def finish(self) -> None:
        """Take all the steps that are left, by itself."""
        while not self.done:
            self.advance(self.step(self.sample(), self.index))


def denoise(step: Step, scheduler: SchedulerMixin, noise: Tensor, *options, **more) -> Tensor:
    """Return the latents (B, C, h, w), float32, at the end of a run by itself; arguments: see `Run`."""
    run = Run(step, scheduler, noise, *options, **more)
    run.finish()
    return run.latents


class LinearStepper:
    """Steps as numbers known beforehand: guidance and step in one pass, and no waiting for the device."""

    def __init__(self, steps: LinearSteps, guidance: float, device: torch.device, rescale: float = 0.0):
        self.scales, self.coefficients = steps.scales.tolist(), steps.coefficients(guidance, device)
        self.rescale = rescale
        self.remembers = bool(steps.numbers[:, -1].any())
        self.previous: Tensor | None = None
        self.z0: Tensor | None = None

    def scale(self, latents: Tensor, i: int) -> Tensor:
        """Return the model's input at step i."""
        return latents * self.scales[i]

    def advance(self, latents: Tensor, output: Tensor, i: int) -> Tensor:
        """Return the latents after step i. output: as many rows, or twice as many, the unguided first."""
        latents, self.z0 = ops.guidance_step(
            latents, output, self.coefficients[i], self.previous, rescale=self.rescale
        )
        self.previous = self.z0 if self.remembers else None
        return latents

    def denoised(self) -> Callable[[], Tensor]:
        """Return what gives the z0 that the last step has predicted."""
        z0 = self.z0
        return lambda: z0


class SchedulerStepper:
    """The scheduler's own steps, see `LinearStepper`."""

    def __init__(
        self,
        scheduler: SchedulerMixin,
        guidance: float,
        generators: Sequence[torch.Generator],
        rescale: float = 0.0,
        timesteps: Tensor | None = None,
        shown: bool = False,
    ):
        """shown: whether `denoised` will be asked for."""
        self.scheduler, self.guidance, self.rescale = scheduler, guidance, rescale
        self.timesteps = scheduler.timesteps if timesteps is None else timesteps
        takes = inspect.signature(scheduler.step).parameters
        self.options = {"generator": _shared(generators)} if "generator" in takes else {}
        if "eta" in takes:  # TCD's own is another than diffusers' pipelines'
            self.options["eta"] = 0.0
        self.fresh = copy.deepcopy(scheduler) if shown else None
        self.levels: list[tuple[float, float]] | None = None
        self.last: tuple[Tensor, Tensor, int] | None = None
        self.z0: Tensor | None = None

    def scale(self, latents: Tensor, i: int) -> Tensor:
        return self.scheduler.scale_model_input(latents, self.timesteps[i])

    def advance(self, latents: Tensor, output: Tensor, i: int) -> Tensor:
        if len(output) > len(latents):
            output = reference.guide(output, self.guidance, self.rescale)
        self.last = (latents, output, i) if self.fresh is not None else None
        t = self.timesteps[i]
        made = self.scheduler.step(output, t, latents, **self.options)
        self.z0 = made.get("pred_original_sample") if self.fresh is not None else None
        return made.prev_sample

    def denoised(self) -> Callable[[], Tensor]:
        """Return what gives the z0 that the last step has predicted: the scheduler's own where it says, it may clip."""
        z0 = self.z0
        return partial(self._predicted, *self.last) if z0 is None else lambda: z0

    def _predicted(self, latents: Tensor, output: Tensor, i: int) -> Tensor:
        if self.levels is None:
            self.levels = noise_levels(self.fresh, self.timesteps)
        alpha, sigma = self.levels[i]
        return predicted_z0(latents, output, alpha, sigma, self.scheduler.config.prediction_type)


def predicted_z0(latents: Tensor, output: Tensor, alpha: float, sigma: float, prediction: str) -> Tensor:
    """Return z0 of latents alpha z0 + sigma eps, whose output is of `prediction` ("epsilon", "v_prediction", "sample").

    A v-prediction is of latents whose alpha^2 + sigma^2 is 1 (arXiv 2202.00512), which these are but for a factor.
    """
    if prediction == "sample":
        return output
    if prediction == "epsilon":
        return (latents - sigma * output) / max(alpha, 1e-6)
    spread = math.hypot(alpha, sigma)
    return (alpha * latents / spread - sigma * output) / spread
