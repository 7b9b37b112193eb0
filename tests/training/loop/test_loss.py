"""training.loop.loss against the formulas of the papers, computed here in float64."""

import dataclasses

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from kernels import ops, reference
from runtime.errors import InputError
from tests.support.tolerances import assert_close
from training.config import TrainConfig
from training.data.rows import timestep
from training.loop.loss import (
    EDGES,
    PREDICTIONS,
    add_noise,
    check_schedule,
    noise_weight,
    schedule_of,
    training_loss,
    v_target,
    z0_weight,
)

COUNT = 1000
SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ABAR = torch.tensor([0.9991, 0.8, 0.5, 0.0047])  # from SDXL's first timestep to its last
SNR = ABAR.double() / (1 - ABAR.double())
T = torch.tensor([0, 200, 500, 999])


@given(u=st.floats(0, 1, exclude_max=True), count=st.integers(1, 4000))
def test_timesteps_are_those_of_the_schedule(u, count):
    assert timestep(u, count, "uniform") == int(u * count)
    assert 0 <= timestep(u, count, "cubic") < count


def test_cubic_timesteps_are_one_minus_u_cubed():
    u = [0.0, 0.25, 0.5, 0.75, 0.9995]
    assert [timestep(x, COUNT, "cubic") for x in u] == [999, 984, 875, 578, 1]
    assert [timestep(x, COUNT, "uniform") for x in u] == [0, 250, 500, 750, 999]


@pytest.mark.parametrize(
    ("sampling", "share"),
    [("uniform", lambda s: s), ("cubic", lambda s: 1 - (1 - s) ** (1 / 3))],
    ids=["uniform", "cubic"],
)
def test_the_share_of_timesteps_below_each_is_that_of_the_formula(sampling, share):
    """Cubic: P(t < s T) = P(u^3 > 1 - s) = 1 - (1 - s)^(1/3), over an even grid of u."""
    drawn = torch.tensor([timestep((i + 0.5) / 10_000, COUNT, sampling) for i in range(10_000)])
    for s in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert (drawn < s * COUNT).double().mean().item() == pytest.approx(share(s), abs=2e-3)


@pytest.fixture
def tensors():
    """latents, noise, output (4, 3, 6, 5), mask (4, 1, 6, 5), in float32."""
    latents, noise, output = (torch.randn(4, 3, 6, 5) for _ in range(3))
    return latents, noise, output, torch.rand(4, 1, 6, 5)


def test_noise_is_added_as_variance_preserving(tensors):
    latents, noise, *_ = tensors
    noisy, alpha, sigma = add_noise(latents, noise, ABAR)
    for i, abar in enumerate(ABAR.double()):
        expected = abar.sqrt() * latents[i].double() + (1 - abar).sqrt() * noise[i].double()
        assert_close(f"row {i}", noisy[i], expected)
    assert_close("variance", alpha.square() + sigma.square(), torch.ones(4))


def test_noise_is_added_in_the_latents_dtype(tensors):
    latents, noise = (x.bfloat16() for x in tensors[:2])
    assert {x.dtype for x in add_noise(latents, noise, ABAR)} == {torch.bfloat16}


def test_velocity_is_what_the_scheduler_of_diffusers_says(tensors):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents, noise, *_ = tensors
    abar = scheduler.alphas_cumprod[T]
    noisy, alpha, sigma = add_noise(latents, noise, abar)
    assert_close("noisy", noisy, scheduler.add_noise(latents, noise, T))
    assert_close(
        "velocity", v_target(latents, noise, alpha, sigma), scheduler.get_velocity(latents, noise, T)
    )


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", lambda snr, gamma: snr.clamp(max=gamma) / snr),
        ("v_prediction", lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1)),
        ("sample", lambda snr, gamma: snr.clamp(max=gamma)),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_papers_for_each_prediction(prediction, expected, gamma):
    """Hang et al. 2023, section 3.4: min(SNR, gamma) on the loss of z0, restated for what is predicted."""
    assert_close("weights", noise_weight(ABAR, prediction, gamma), expected(SNR, gamma))


def test_min_snr_is_one_rule_on_the_error_of_z0(tensors):
    """One and the same predicted z0 has the same weighted loss, whichever way it was predicted."""
    latents, noise, wrong, _ = (x.double() for x in tensors)
    noisy, alpha, sigma = add_noise(latents, noise, ABAR.double())
    outputs = {
        "sample": wrong,
        "epsilon": (noisy - alpha[:, None, None, None] * wrong) / sigma[:, None, None, None],
    }
    outputs["v_prediction"] = v_target(wrong, outputs["epsilon"], alpha, sigma)
    targets = {"sample": latents, "epsilon": noise, "v_prediction": v_target(latents, noise, alpha, sigma)}
    losses = [
        noise_weight(ABAR.double(), p, 5.0) * (outputs[p] - targets[p]).square().mean(dim=(1, 2, 3))
        for p in PREDICTIONS
    ]
    assert_close("epsilon", losses[0], losses[2])
    assert_close("v", losses[1], losses[2])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_no_gamma_is_no_weighting(prediction):
    assert torch.equal(noise_weight(ABAR, prediction, 0.0), torch.ones(4))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_finite_at_pure_noise_and_at_none(prediction):
    weights = noise_weight(torch.tensor([0.0, 1.0]), prediction, 5.0)
    limits = {"epsilon": [1.0, 0.0], "v_prediction": [0.0, 0.0], "sample": [0.0, 5.0]}[prediction]
    assert weights.tolist() == pytest.approx(limits)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"z0_schedule": "constant"}, [0.25, 0.25, 0.25, 0.25]),
        ({"z0_schedule": "step_range", "z0_from": 200, "z0_to": 500}, [0.0, 0.25, 0.25, 0.0]),
        ({"z0_schedule": "step_range", "z0_from": 201, "z0_to": 499}, [0.0, 0.0, 0.0, 0.0]),
        ({"z0_schedule": "step_range"}, [0.25, 0.25, 0.25, 0.25]),
        ({"z0_schedule": "time"}, (0.25 * (1 - ABAR)).tolist()),
    ],
    ids=str,
)
def test_the_weight_of_the_z0_loss_over_timesteps(options, expected):
    weight = z0_weight(T, ABAR, TrainConfig(z0_weight=0.25, **options))
    assert weight.shape == (4,) and weight.dtype == torch.float32
    assert weight.tolist() == pytest.approx(expected)


CONFIG = TrainConfig(noise_weight=0.7, z0_weight=0.3, z0_schedule="time", min_snr=5.0)


def expected_loss(tensors, prediction, config):
    """Both terms in float64, the noise term from its definition."""
    latents, noise, output, mask = (x.double() for x in tensors)
    abar = ABAR.double()
    noisy, alpha, sigma = add_noise(latents, noise, abar)
    target = {"epsilon": noise, "v_prediction": v_target(latents, noise, alpha, sigma), "sample": latents}[
        prediction
    ]
    weight = config.noise_weight * noise_weight(abar, prediction, config.min_snr)
    terms = {"noise": weight * (output - target).square().mean(dim=(1, 2, 3))}
    if config.z0_loss != "off":
        edges = EDGES[config.z0_loss]
        loss = reference.sobel_z0_loss(output, noisy, latents, mask, alpha, sigma, prediction, edges=edges)
        terms["z0"] = z0_weight(T, abar, config) * loss
    return terms


def loss(tensors, prediction, config):
    latents, noise, output, mask = tensors
    noisy, *_ = add_noise(latents, noise, ABAR)
    with ops.use_backend("torch"):
        return training_loss(output, noisy, latents, noise, mask, T, ABAR, prediction, config)


@pytest.mark.parametrize("z0_loss", ["off", *EDGES])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_term_of_every_prediction_is_the_definition(prediction, z0_loss, tensors):
    config = dataclasses.replace(CONFIG, z0_loss=z0_loss)
    expected, found = expected_loss(tensors, prediction, config), loss(tensors, prediction, config)
    assert list(found) == (["noise"] if z0_loss == "off" else ["noise", "z0"]) == list(expected)
    for name, value in found.items():
        assert value.shape == (4,) and value.dtype == torch.float32
        # the target is (z_t - alpha z0) / sigma: at the first timestep a difference of near numbers over 0.03
        assert_close(name, value, expected[name], "gradient" if name == "noise" else "op")


@pytest.mark.parametrize("z0_loss", ["off", "sobel"])
def test_the_gradient_is_the_definitions(z0_loss, tensors):
    config = dataclasses.replace(CONFIG, z0_loss=z0_loss)
    output = tensors[2].requires_grad_()
    (found,) = torch.autograd.grad(sum(x.sum() for x in loss(tensors, "epsilon", config).values()), output)
    terms = expected_loss(tensors, "epsilon", config)
    (expected,) = torch.autograd.grad(sum(x.sum() for x in terms.values()), output)
    assert_close("gradient", found, expected, "gradient")


def test_the_mask_bounds_the_z0_loss_and_not_the_noise_loss(tensors):
    latents, noise, output, mask = tensors
    full = loss(tensors, "epsilon", CONFIG)
    none = loss((latents, noise, output, torch.zeros_like(mask)), "epsilon", CONFIG)
    assert none["z0"].abs().max() == 0 < full["z0"].min()
    assert torch.equal(none["noise"], full["noise"])


def test_one_mask_may_serve_the_whole_batch(tensors):
    one, many = tensors[3][:1], tensors[3][:1].expand(4, -1, -1, -1)
    losses = [loss((*tensors[:3], mask), "epsilon", CONFIG)["z0"] for mask in (one, many)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("prediction", ["flow", "x0", ""])
def test_an_unknown_prediction_is_refused(prediction):
    with pytest.raises(
        InputError, match=f"predicts '{prediction}'; expected one of epsilon, v_prediction, sample"
    ):
        check_schedule(ABAR, prediction, TrainConfig())


def test_epsilon_at_pure_noise_cannot_give_the_z0_loss():
    ends_in_noise = torch.tensor([0.9, 0.5, 0.0])
    with pytest.raises(InputError, match="z0_loss: the model's noise schedule ends in pure noise"):
        check_schedule(ends_in_noise, "epsilon", TrainConfig())
    check_schedule(ends_in_noise, "epsilon", TrainConfig(z0_loss="off"))
    check_schedule(ends_in_noise, "v_prediction", TrainConfig())
    check_schedule(ABAR, "epsilon", TrainConfig())


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_pure_noise_is_known_as_each_scheduler_writes_it(scheduler):
    made = [scheduler(**SDXL_BETAS, rescale_betas_zero_snr=zero) for zero in (True, False)]
    noise, usual = map(schedule_of, made)
    with pytest.raises(InputError, match="ends in pure noise"):
        check_schedule(noise, "epsilon", TrainConfig())
    check_schedule(noise, "v_prediction", TrainConfig())
    check_schedule(usual, "epsilon", TrainConfig())


def test_a_model_whose_scheduler_has_no_option_for_zero_snr_is_trained_to_it_as_it_is_drawn():
    zero = EulerDiscreteScheduler(**SDXL_BETAS, rescale_betas_zero_snr=True)
    kept = HeunDiscreteScheduler.from_config(zero.config)  # with the option, which it does not read
    torch.testing.assert_close(schedule_of(kept), schedule_of(zero), rtol=1e-3, atol=1e-9)


def test_a_scheduler_of_another_process_is_refused():
    with pytest.raises(InputError, match="its FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        schedule_of(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_z0_loss_is_finite_at_pure_noise_where_it_is_allowed(prediction, tensors):
    latents, noise, output, mask = tensors
    abar = torch.tensor([0.5, 0.2, 0.1, 0.0])
    noisy, *_ = add_noise(latents, noise, abar)
    terms = training_loss(output, noisy, latents, noise, mask, T, abar, prediction, CONFIG)
    assert all(value.isfinite().all() for value in terms.values())
