"""runtime.sampling.schedulers: every scheduler class of diffusers denoises, or is refused in one line."""

import inspect
from itertools import product

import diffusers
import pytest
import torch

from runtime.errors import InputError
from runtime.sampling.held import image_trajectory
from runtime.sampling.loop import denoise
from runtime.sampling.schedulers import (
    SCHEDULERS,
    check_scheduler,
    count_steps,
    make_scheduler,
    noise_levels,
    rehearse,
    set_timesteps,
)
from tests.support.tolerances import relative_rms

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


SDXL = diffusers.EulerDiscreteScheduler.from_config(BASE.config, timestep_spacing="leading", steps_offset=1)


# Not PNDM, nor LMS from the middle on: diffusers' own steps leave the noise levels there.
@pytest.mark.parametrize(
    ("name", "left"),
    [
        *product(
            ["euler", "heun", "dpm++2m", "dpm++2m_karras", "unipc", "ddim", "KDPM2DiscreteScheduler"],
            [None, 5],
        ),
        ("euler_trailing", None),
        ("lms", None),
    ],
)
def test_noise_levels_are_those_of_a_run_that_predicts_the_noise_exactly(name, left):
    latents, noise = torch.randn(2, 1, 4, 4, 4)
    found = []
    scheduler = make_scheduler(name, SDXL)
    timesteps = set_timesteps(scheduler, 8, "cpu", left)
    levels = noise_levels(scheduler, timesteps)
    assert len(levels) == len(timesteps) + 1 and levels[-1] == (1, 0)

    def keep(latents: torch.Tensor, step: int) -> torch.Tensor:
        found.append(latents)
        return latents

    denoise(
        lambda sample, _: noise,
        scheduler,
        noise,
        1.0,
        [],
        None,
        timesteps=timesteps,
        start=latents,
        after_step=keep,
    )
    for made, expected in zip(found[:-1], image_trajectory(latents, noise, levels), strict=False):
        assert relative_rms(made, expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("left", [None, 3])
@pytest.mark.parametrize("name", [*SCHEDULERS, *CLASSES])
def test_steps_are_counted_as_they_are_run(name, left):
    if not isinstance(made_or_refusal(name, 6), str):
        own = make_scheduler(name, SDXL)
        assert count_steps(name, 6, left) == len(set_timesteps(own, 6, torch.device("cpu"), left))
        assert count_steps(own, 6, left) == count_steps(name, 6, left)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_noise_levels(name):
    scheduler = made_or_refusal(name, 6)
    if not isinstance(scheduler, str):
        levels = noise_levels(scheduler, scheduler.timesteps)
        sigmas = [sigma / alpha for alpha, sigma in levels]
        assert all(a >= b for a, b in zip(sigmas[::2], sigmas[2::2], strict=False)) and sigmas[-1] == 0


def test_noise_levels_leave_the_scheduler_as_it_was():
    scheduler = make_scheduler("euler", BASE)
    timesteps = set_timesteps(scheduler, 4, "cpu", 2)
    noise_levels(scheduler, timesteps)
    assert scheduler.begin_index == 2 and scheduler.step_index is None


@pytest.mark.parametrize("own", ["use_beta_sigmas", "use_exponential_sigmas"])
def test_a_name_takes_the_place_of_the_models_noise_levels(own):
    scheduler = make_scheduler(
        "dpm++2m_karras", diffusers.EulerDiscreteScheduler.from_config(BASE.config, **{own: True})
    )
    assert scheduler.config.use_karras_sigmas and not scheduler.config[own]


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            diffusers.EulerAncestralDiscreteScheduler(prediction_type="sample"),
            "EulerAncestralDiscreteScheduler: it refuses a step: prediction_type not implemented yet: sample",
        ),
        (diffusers.PNDMScheduler(prediction_type="sample", skip_prk_steps=True), "PNDMScheduler: it refuses a step"),
        (
            diffusers.DPMSolverMultistepScheduler(variance_type="learned_range"),
            "DPMSolverMultistepScheduler: it refuses a step",
        ),
    ],
)  # fmt: skip
def test_a_step_that_is_refused_is_said_before_the_run(scheduler, message):
    made = make_scheduler(scheduler, BASE)
    set_timesteps(made, 4, torch.device("cpu"))
    with pytest.raises(InputError, match=f"scheduler {message}"):
        rehearse(made)


def test_options_that_do_not_go_together_are_said():
    with pytest.raises(InputError, match="scheduler DPMSolverMultistepScheduler: it refuses its options: "):
        make_scheduler("DPMSolverMultistepScheduler", diffusers.DEISMultistepScheduler())


def test_the_first_two_noise_levels_may_share_a_timestep():
    """Karras' levels of a schedule that ends at zero SNR: 4096, 3354, ... are all of the last timestep."""
    options = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    scheduler = make_scheduler(
        "dpm++2m_karras", diffusers.EulerDiscreteScheduler.from_config(BASE.config, **options)
    )
    timesteps = set_timesteps(scheduler, 30, torch.device("cpu"))
    assert timesteps[0] == timesteps[1]
    made = denoise(
        lambda sample, _: sample / 2, scheduler, torch.randn(1, 4, 4, 4), 1.0, [], timesteps=timesteps
    )
    assert made.isfinite().all() and scheduler.begin_index == 0


@pytest.mark.parametrize("name", ["heun", "lms", "KDPM2DiscreteScheduler", "DPMSolverSinglestepScheduler"])
def test_a_class_without_the_option_ends_at_zero_snr_too(name):
    """A prediction that is exact finds the picture only where all noise levels are those it was made for."""
    zero_snr = diffusers.EulerDiscreteScheduler.from_config(
        BASE.config,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    scheduler, picture = make_scheduler(name, zero_snr), torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(scheduler.alphas_cumprod, zero_snr.alphas_cumprod, rtol=1e-3, atol=1e-9)

    def predict(sample, timestep):
        alpha = zero_snr.alphas_cumprod[int(timestep)].sqrt()
        sigma = (1 - alpha.square()).sqrt()
        return alpha * (sample - alpha * picture) / sigma - sigma * picture

    timesteps = set_timesteps(scheduler, 8, torch.device("cpu"))
    x = torch.randn(1, 4, 4, 4) * scheduler.init_noise_sigma
    for timestep in timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, timestep), timestep), timestep, x)[0]
    torch.testing.assert_close(x, picture, rtol=1e-4, atol=1e-4)


def test_eta_is_that_of_diffusers_pipelines():
    """TCD's own step draws noise, its pipelines' eta of 0 does not."""
    noise = torch.randn(1, 4, 4, 4)
    found = []
    for seed in (1, 2):
        scheduler = make_scheduler("TCDScheduler", BASE)
        set_timesteps(scheduler, 4, torch.device("cpu"))
        found.append(
            denoise(
                lambda sample, _: sample / 2, scheduler, noise, 1.0, [torch.Generator().manual_seed(seed)]
            )
        )
    assert torch.equal(*found)
