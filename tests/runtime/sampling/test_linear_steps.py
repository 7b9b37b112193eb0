"""A linear scheduler's numbers make its steps, whatever its configuration; others are left to themselves."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from kernels import ops
from runtime.sampling import linear_steps as linear_sampler
from runtime.sampling.linear_steps import linear_steps
from runtime.sampling.loop import Run, denoise
from runtime.sampling.schedulers import SCHEDULERS, make_scheduler, set_timesteps
from tests.support.tolerances import relative_rms

LINEAR = ("euler", "euler_trailing", "ddim", "dpm++2m", "dpm++2m_karras")
CPU = torch.device("cpu")


def default(**options) -> EulerDiscreteScheduler:
    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return EulerDiscreteScheduler(**(given | options))


def run_both(scheduler, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random outputs, step by step: diffusers' samples and those made with the numbers."""
    set_timesteps(scheduler, steps, CPU)
    linear = linear_steps(scheduler)
    coefficients = linear.coefficients(1.0, CPU)
    generator = torch.Generator().manual_seed(steps)
    theirs = torch.randn(2, 4, 5, 3, generator=generator) * scheduler.init_noise_sigma
    ours, previous = theirs.clone(), None
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.scale_model_input(theirs, t)
        assert relative_rms(ours * linear.scales[i], expected) < 1e-5
        output = torch.randn(theirs.shape, generator=generator)
        theirs = scheduler.step(output, t, theirs, return_dict=False)[0]
        ours, previous = ops.guidance_step(ours, output, coefficients[i], previous)
    return theirs, ours


@pytest.mark.parametrize("steps", [1, 2, 3, 30])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", LINEAR)
def test_the_numbers_make_the_schedulers_steps(name, prediction, steps):
    theirs, ours = run_both(make_scheduler(name, default(prediction_type=prediction)), steps)
    assert relative_rms(ours, theirs) < 2e-6


@pytest.mark.parametrize(
    "scheduler",
    [
        default(timestep_spacing="trailing"),
        default(use_karras_sigmas=True),
        default(final_sigmas_type="sigma_min"),
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="linspace"),
        DPMSolverMultistepScheduler(solver_type="heun"),
        DPMSolverMultistepScheduler(solver_order=1),
        DPMSolverMultistepScheduler(euler_at_final=True, use_lu_lambdas=True),
        DPMSolverMultistepScheduler(lower_order_final=False, final_sigmas_type="sigma_min"),
    ],
    ids=[
        "trailing",
        "karras",
        "sigma_min",
        "ddim",
        "heun's solver",
        "first order",
        "lu",
        "higher order at the end",
    ],
)
def test_whatever_the_configuration(scheduler):
    theirs, ours = run_both(scheduler, 7)
    assert relative_rms(ours, theirs) < 2e-6


@pytest.mark.parametrize(
    "scheduler",
    [make_scheduler(name, default()) for name in SCHEDULERS if name not in LINEAR]
    + [
        DDIMScheduler(clip_sample=True),
        DPMSolverMultistepScheduler(thresholding=True),
        DPMSolverMultistepScheduler(solver_order=3),
        default(rescale_betas_zero_snr=True, beta_schedule="linear", timestep_spacing="trailing"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_others_step_for_themselves(scheduler):
    set_timesteps(scheduler, 5, CPU)
    found = linear_steps(scheduler)
    assert found is None or found.numbers.isfinite().all()
    noise = torch.randn(1, 4, 5, 3)
    made = denoise(lambda sample, i: sample / 2, scheduler, noise, 1.0, [torch.Generator().manual_seed(0)])
    assert made.isfinite().all()


def test_asking_works_wherever_the_latents_are():
    """DDIM's `add_noise` leaves its schedule there; "meta" stands in for a GPU."""
    scheduler = make_scheduler("ddim", default())
    set_timesteps(scheduler, 7, CPU)
    noise = torch.zeros(1, 4, 2, 2, device="meta")
    Run(lambda x, i: x, scheduler, noise, 1.0, [torch.Generator()], start=noise)


def test_asking_leaves_the_scheduler_as_it_was_and_is_done_once(monkeypatch):
    scheduler = make_scheduler("dpm++2m", default())
    set_timesteps(scheduler, 4, CPU)
    monkeypatch.setattr(linear_sampler, "_known", {})
    first = linear_steps(scheduler)
    assert scheduler.step_index is None and scheduler.model_outputs == [None, None]
    assert linear_steps(scheduler) is first
    set_timesteps(scheduler, 5, CPU)
    assert len(linear_steps(scheduler).numbers) == 5
    for steps in range(6, 6 + linear_sampler.KEPT):
        set_timesteps(scheduler, steps, CPU)
        linear_steps(scheduler)
    assert len(linear_sampler._known) == linear_sampler.KEPT


@pytest.mark.skipif(not (ops.INTERPRETED or torch.cuda.is_available()), reason="no Triton here")
@pytest.mark.parametrize("name", ["euler", "dpm++2m"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_loop_runs_on_the_kernel(name, guidance):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise, made = torch.randn(2, 4, 6, 5, device=device), {}
    for backend in ("torch", "triton"):
        scheduler = make_scheduler(name, default())
        set_timesteps(scheduler, 5, device)
        with ops.use_backend(backend):
            made[backend] = denoise(lambda sample, i: sample.sin(), scheduler, noise, guidance, [])
    assert relative_rms(made["triton"], made["torch"]) < 1e-5
