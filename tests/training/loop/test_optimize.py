"""training.loop.optimize: learning rates and averages by their formulas, AdamW as PyTorch's."""

import math
import sys

import pytest
import torch
from torch import nn

from runtime.errors import InputError
from training.config import TrainConfig
from training.loop.optimize import Average, learning_rate, make_optimizer


def rates(at, **options):
    config = TrainConfig(**{"lr": 2.0, "steps": 12, **options})
    return [learning_rate(step, config, samples=4) for step in at]


def test_a_constant_rate_is_constant():
    assert rates(range(12)) == [2.0] * 12


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_evenly_to_the_rate(schedule):
    assert rates(range(5), lr_schedule=schedule, warmup=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_linear_falls_to_nothing_after_the_last_step():
    assert rates([0, 3, 6, 11, 12], lr_schedule="linear") == pytest.approx([2, 1.5, 1, 2 / 12, 0])
    assert rates([3, 4, 8, 12], lr_schedule="linear", warmup=4) == pytest.approx([2, 2, 1, 0])


def test_cosine_falls_to_nothing_after_the_last_step():
    half = 1 + math.cos(math.pi / 4)
    assert rates([0, 3, 6, 12], lr_schedule="cosine") == pytest.approx([2, half, 1, 0])
    assert rates([4, 6, 8, 12], lr_schedule="cosine", warmup=4) == pytest.approx([2, half, 1, 0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_are_as_diffusers_give_them(schedule):
    """Whose first step of warm-up has a rate of 0: ours is one step ahead of it there."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=12)
    theirs = [(scheduler.get_last_lr()[0], optimizer.step(), scheduler.step())[0] for _ in range(12)]
    ours = rates(range(12), lr_schedule=schedule, warmup=4)
    assert ours[:4] == pytest.approx(theirs[1:5]) and ours[4:] == pytest.approx(theirs[4:])


def test_a_run_that_is_all_warm_up_has_no_fall():
    assert rates(range(4), steps=4, warmup=4, lr_schedule="linear") == pytest.approx([0.5, 1, 1.5, 2])
    assert rates([4], steps=4, warmup=4, lr_schedule="linear") == [2.0]


def test_the_rate_is_scaled_by_the_samples_of_a_step_where_that_is_asked_for():
    assert rates([0, 5], scale_lr=True) == [8.0, 8.0]
    assert rates([0, 5], scale_lr=True, warmup=2) == [4.0, 8.0]


@pytest.fixture
def parameters():
    return [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]


def test_the_optimizer_is_pytorchs_adamw_with_the_options(parameters):
    """Two steps of Loshchilov & Hutter's formula, in float64."""
    lr, beta1, beta2, decay = 0.1, 0.7, 0.8, 0.3
    config = TrainConfig(lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay)
    optimizer = make_optimizer(parameters, config)
    expected = [p.detach().double() for p in parameters]
    first, second = ([torch.zeros_like(e) for e in expected] for _ in range(2))
    for step in (1, 2):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * g**2
            m, v = first[i] / (1 - beta1**step), second[i] / (1 - beta2**step)
            expected[i] = expected[i] * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-8)
        optimizer.step()
    assert all(
        torch.allclose(p.detach().double(), e, atol=1e-6) for p, e in zip(parameters, expected, strict=True)
    )
    assert optimizer.param_groups[0]["fused"]


def test_eight_bits_without_its_package_is_an_input_error(parameters, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        InputError, match="optimizer adamw8bit: needs the package bitsandbytes; pip install bitsandbytes"
    ):
        make_optimizer(parameters, TrainConfig(optimizer="adamw8bit"))


def test_an_average_starts_at_the_parameters_and_keeps_its_own_values(parameters):
    average = Average(parameters, 0.9)
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        parameters[0].add_(1)
    assert all(torch.equal(value, b) for value, b in zip(average.values, before, strict=True))


def test_an_average_follows_its_formula_closely_at_first(parameters):
    """d_n = min(decay, (1 + n) / (10 + n)) after n steps, v <- d v + (1 - d) p; here 0.5 from the eighth on."""
    average = Average(parameters, 0.5)
    expected = [p.detach().double() for p in parameters]
    for n in range(1, 15):
        decay = min(0.5, (1 + n) / (10 + n))
        assert decay == (0.5 if n >= 8 else (1 + n) / (10 + n))
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p.copy_(torch.randn_like(p))
                expected[i] = decay * expected[i] + (1 - decay) * p.double()
        average.update(n)
    assert all(
        torch.allclose(v.double(), e, atol=1e-6) for v, e in zip(average.values, expected, strict=True)
    )


def test_an_average_takes_no_gradient(parameters):
    average = Average(parameters, 0.9)
    average.update(1)
    assert not any(value.requires_grad for value in average.values)
    assert all(p.requires_grad for p in parameters)
