"""runtime.sampling.schedulers: every scheduler class of diffusers denoises, or is refused in one line."""

import inspect

import diffusers
import pytest
import torch

from runtime.errors import InputError
from runtime.sampling.loop import denoise
from runtime.sampling.schedulers import SCHEDULERS, check_scheduler, make_scheduler, set_timesteps

CLASSES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and name != "SchedulerMixin")
BASE = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def made_or_refusal(name: str, steps: int):
    """Return the scheduler with its timesteps set, or the line it is refused with."""
    try:
        scheduler = make_scheduler(name, BASE)
        set_timesteps(scheduler, steps, torch.device("cpu"))
    except InputError as error:
        return str(error)
    return scheduler


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("name", [*SCHEDULERS, *CLASSES])
def test_every_class_runs_or_is_refused_in_one_line(name, steps):
    noise, generators = torch.randn(2, 4, 4, 4), [torch.Generator().manual_seed(i) for i in range(2)]
    scheduler = made_or_refusal(name, steps)
    if isinstance(scheduler, str):
        assert "\n" not in scheduler and len(scheduler) < 300 and name not in SCHEDULERS
        return
    made = denoise(lambda sample, _: sample.float() / 2, scheduler, noise, 1.0, generators)
    assert made.shape == noise.shape and made.isfinite().all()


def test_those_that_fit_are_many():
    fitting = []
    for name in CLASSES:
        try:
            check_scheduler(name)
            fitting.append(name)
        except InputError:
            pass
    assert len(fitting) >= 15
    assert all(inspect.isclass(getattr(diffusers, name)) for name in fitting)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", "is for models of another kind"),
        ("CogVideoXDDIMScheduler", "is for models of another kind"),
        ("DDIMInverseScheduler", "is for models of another kind"),
        ("IPNDMScheduler", "is for models of another kind"),
        ("DPMSolver", "is unknown; expected one of euler"),
    ],
)
def test_what_does_not_fit_is_said(name, message):
    with pytest.raises(InputError, match=message):
        check_scheduler(name)


def test_a_scheduler_object_of_another_kind_is_refused():
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler' is for models of another kind"):
        make_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), BASE)
