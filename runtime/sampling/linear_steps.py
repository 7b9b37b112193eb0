"""Schedulers whose step is linear, as numbers: a step of theirs is then `kernels.ops.guidance_step`.

Euler, DDIM and DPM++ 2M make the next sample of the sample, the model's output and the denoised sample of the step
before, each times a number that depends on the step alone. Those numbers are not derived here: diffusers' own scheduler
is asked for them, by running it once on samples of four values.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from runtime.sampling.schedulers import copy_on_cpu


@dataclass(frozen=True)
class LinearSteps:
    """The coefficients of T steps, float64 on the CPU.

    scales: (T,); the model's input is scale * sample. numbers: (T, 5), the p, q, a, b and c of
    denoised = p sample + q output; next = a sample + b denoised + c (denoised of the step before).
    """

    scales: Tensor
    numbers: Tensor

    def coefficients(self, guidance: float, device: torch.device) -> Tensor:
        """Return (T, 6) float32, what `guidance_step` takes: the guidance before the five."""
        weights = torch.full((len(self.numbers), 1), guidance, dtype=self.numbers.dtype)
        return torch.cat([weights, self.numbers], dim=1).float().to(device)


def linear_steps(scheduler: SchedulerMixin, timesteps: Tensor | None = None) -> LinearSteps | None:
    """Return the numbers of a scheduler whose timesteps are set; None where its step is not of that kind.

    timesteps: those to run, the last of the scheduler's; all by default.

    Asking takes as long as the steps themselves, so the answers of the last KEPT schedules are kept.
    """
    if not _is_linear(scheduler):
        return None
    with _asking:
        found = _answer(scheduler, scheduler.timesteps if timesteps is None else timesteps)
    return found if found.numbers.isfinite().all() else None


def _answer(scheduler: SchedulerMixin, timesteps: Tensor) -> LinearSteps:
    key = (
        type(scheduler),
        repr(sorted(scheduler.config.items())),
        tuple(scheduler.timesteps.tolist()),
        len(timesteps),
    )
    if key not in _known:
        if len(_known) == KEPT:
            del _known[next(iter(_known))]
        _known[key] = _ask(copy_on_cpu(scheduler), len(timesteps))
    return _known[key]


KEPT = 32
_known: dict[tuple, LinearSteps] = {}
_asking = threading.Lock()  # `_known` is the process's


def _ask(scheduler: SchedulerMixin, count: int) -> LinearSteps:
    scales, numbers, before = [], [], torch.zeros(4).double()
    for i, t in enumerate(scheduler.timesteps[-count:]):
        # Of four values, this step's sample and output are two, those of the step before the other two.
        own, past = slice(2 * (i % 2), 2 * (i % 2) + 2), slice(2 - 2 * (i % 2), 4 - 2 * (i % 2))
        sample, output = torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
        sample[0, own.start] = output[0, own.start + 1] = 1
        scales.append(scheduler.scale_model_input(sample, t)[0, own.start].item())
        made = scheduler.step(output, t, sample)
        denoised, after = (x.flatten().double() for x in (_denoised(scheduler, made), made.prev_sample))
        (p, q), (of_sample, of_output) = denoised[own].tolist(), after[own].tolist()
        b = of_output / q
        c = after[past] @ before[past] / before[past].square().sum().clamp_min(1e-30)
        numbers.append([p, q, of_sample - b * p, b, c.item()])
        before = denoised
    return LinearSteps(torch.tensor(scales).double(), torch.tensor(numbers).double())


def _is_linear(scheduler: SchedulerMixin) -> bool:
    config = scheduler.config
    if config.get("clip_sample") or config.get("thresholding"):
        return False
    if type(scheduler) is DPMSolverMultistepScheduler:
        plus = config.algorithm_type == "dpmsolver++" and config.solver_order <= 2
        return plus and config.variance_type is None
    return type(scheduler) in (EulerDiscreteScheduler, DDIMScheduler)


def _denoised(scheduler: SchedulerMixin, made) -> Tensor:
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return scheduler.model_outputs[-1]
    return made.pred_original_sample
