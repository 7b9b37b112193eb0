"""The kernel of guidance_step against the reference in float64, and against diffusers' samplers step by step."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import guidance_step as kernel
from kernels import ops
from tests.support.kernel_cases import (
    CUTS,
    DEVICE,
    NCHW,
    NHWC,
    OUTPUT,
    assert_compiles,
    assert_compiles_once,
    assert_matches,
    poisoned,
    random,
)
from tests.support.tolerances import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPE = (2, 4, 5, 7)


def make(halves=2, previous=True, dtype=FP32, layouts=(NCHW, NCHW), shape=SHAPE):
    """sample, output, coefficients, previous; layouts of the float32 tensors and of the output."""
    batch, *row = shape
    sample = random(*shape, layout=layouts[0])
    output = random(halves * batch, *row, dtype=dtype, layout=layouts[1], seed=1)
    before = random(*shape, layout=layouts[0], seed=2) if previous else None
    return sample, output, torch.tensor([7.5, 1.1, -0.7, 0.6, 0.9, -0.3], device=DEVICE), before


# Pairwise: guided or not, previous or not, rescale, the output's dtype, layouts of latents and output.
CASES = {
    "unguided": (make(1, False), 0.0),
    "unguided, previous": (make(1, True, FP16, (NHWC, NCHW)), 0.0),
    "unguided is not rescaled": (make(1, False, BF16, (NCHW, NHWC)), 0.7),
    "guided": (make(2, False, BF16, (NCHW, NHWC)), 0.0),
    "guided, previous": (make(2, True, FP32, (NHWC, NHWC)), 0.0),
    "rescaled": (make(2, False, FP16, (NHWC, NHWC)), 0.7),
    "rescaled, previous": (make(2, True, BF16, (NHWC, NCHW)), 0.7),
    "rescaled in full": (make(2, True, FP32, (NCHW, NHWC)), 1.0),
    "rescaled the other way": (make(2, False, FP32), -0.5),
    "one value": (make(2, True, shape=(1, 1, 1, 1)), 0.0),
    "two tiles, the second nearly empty": (make(2, True, shape=(1, 2, 19, 27)), 0.0),  # 513 pixels
    "rescaled over several tiles": (make(2, True, shape=(1, 9, 19, 27)), 0.7),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs(name):
    args, rescale = CASES[name]
    for out in assert_matches("guidance_step", *args, rescale=rescale):
        assert out.dtype == FP32 and out.stride() == args[0].stride()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("cut", CUTS)
def test_slices(cut, rescale):
    """The base around a slice is NaN: what is read beside it would be found."""
    sample, output, coefficients, previous = make()
    sample, output, previous = (CUTS[cut](t) for t in (sample, output, previous))
    assert_matches("guidance_step", sample, output, coefficients, previous, rescale=rescale)


def test_expanded_arguments_and_strided_coefficients():
    """One output for both halves and for all samples; a column of a schedule."""
    sample, output, coefficients, _ = make()
    schedule = torch.stack([coefficients, coefficients * 2], dim=1)
    output = output[:1].expand(4, -1, -1, -1)
    args = sample, output, schedule[:, 1], random(1, 1, 1, 1).expand(SHAPE)
    assert_matches("guidance_step", *args)


def test_rescaling_survives_a_large_mean():
    sample, output, coefficients, previous = make()
    assert_matches("guidance_step", sample, output + 100, coefficients, previous, rescale=0.7)


def test_inputs_stay_as_they_are():
    args = make()
    before = [t.clone() for t in args]
    assert_matches("guidance_step", *args, rescale=0.7)
    for one, other in zip(args, before, strict=True):
        assert torch.equal(one, other)


def euler(scheduler, step, guidance):
    """x' = (s'/s) x + (1 - s'/s) D with D = x - s o; no previous step."""
    s, following = scheduler.sigmas[step : step + 2].double().tolist()
    return [guidance, 1, -s, following / s, 1 - following / s, 0]


def dpm_plus_plus(scheduler, step, guidance):
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, in diffusers' form; first order at both ends."""
    sigmas = scheduler.sigmas[max(step - 1, 0) : step + 2].double()
    alphas = 1 / (sigmas.square() + 1).sqrt()
    sigmas = sigmas * alphas
    half_log_snr = alphas.log() - sigmas.log()
    h = half_log_snr[-1] - half_log_snr[-2]
    weight = -alphas[-1] * torch.expm1(-h)  # of the derivative's first term
    of_previous = 0.0
    if 0 < step < len(scheduler.timesteps) - 1:
        r = (half_log_snr[-2] - half_log_snr[-3]) / h
        of_previous = -weight / (2 * r)
    clean = 1 / alphas[-2], -sigmas[-2] / alphas[-2]
    return [guidance, *clean, sigmas[-1] / sigmas[-2], weight - of_previous, of_previous]


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(
    ("scheduler", "coefficients"),
    [
        pytest.param(EulerDiscreteScheduler(), euler, id="euler"),
        pytest.param(DPMSolverMultistepScheduler(), dpm_plus_plus, id="dpm++ 2m"),
    ],
)
def test_steps_are_diffusers(scheduler, coefficients, rescale):
    """A whole run of five steps, each from the kernel's own last sample, with a model's output that depends on it."""
    scheduler.set_timesteps(5)
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        assert scheduler.config.algorithm_type == "dpmsolver++" and scheduler.config.solver_order == 2
    sample = expected = random(1, 4, 5, 7) * float(scheduler.init_noise_sigma)
    previous = None
    for step, t in enumerate(scheduler.timesteps):
        output = random(2, 4, 5, 7, seed=step)
        numbers = torch.tensor([float(c) for c in coefficients(scheduler, step, 5.0)], device=DEVICE)
        with ops.use_backend("triton"), poisoned():
            sample, previous = ops.guidance_step(sample, output, numbers, previous, rescale=rescale)
        unguided, guided = output.chunk(2)
        combined = unguided + 5.0 * (guided - unguided)
        if rescale:
            combined = rescale_noise_cfg(combined, guided, rescale)
        scheduler.scale_model_input(expected, t)
        expected = scheduler.step(combined, t, expected).prev_sample
        assert_close(f"sample after step {step}", sample, expected, OUTPUT)


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 9), st.integers(1, 9)),
    halves=st.sampled_from([1, 2]),
    previous=st.booleans(),
    layouts=st.tuples(*[st.sampled_from([NCHW, NHWC])] * 2),
    rescale=st.sampled_from([0.0, 0.7]),
)
def test_any_shape(shape, halves, previous, layouts, rescale):
    args = make(halves, previous, FP32, layouts, shape)
    assert_matches("guidance_step", *args, rescale=rescale)


@pytest.mark.parametrize("previous", [False, True], ids=["first step", "previous"])
def test_operator_is_registered_well(previous):
    torch.library.opcheck(kernel.guidance_step_op, (*make(2, previous), 0.7))


@pytest.mark.parametrize("previous", [False, True], ids=["first step", "previous"])
def test_compiles(previous):
    def function(sample, output, coefficients, *previous):
        following, denoised = ops.guidance_step(sample * 2, output, coefficients, *previous, rescale=0.7)
        return following + 1, denoised

    assert_compiles(function, *(t for t in make(2, previous) if t is not None))


def test_compiles_once_for_all_sizes():
    calls = [make(2, shape=(batch, 3, 5, width)) for batch, width in ((2, 7), (11, 9))]
    assert_compiles_once(ops.guidance_step, *calls)


def test_an_empty_batch():
    with ops.use_backend("triton"):
        for out in ops.guidance_step(*make(2, shape=(0, 3, 5, 7))):
            assert out.shape == (0, 3, 5, 7)
