"""A stage stopped at any step and run again ends bit for bit where an uninterrupted one does."""

import os
import signal

import pytest
import torch
from torch import nn

from training.embedded.stage import WARM_UP_STEPS, Stage
from training.loop.optimize import schedule

STEPS = 30


def make(folder):
    torch.manual_seed(0)
    return Stage("toy", nn.Linear(3, 2), folder, steps=STEPS, lr=1e-2, seed=4)


def loss_of(stage, stop_at=None):
    def loss(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"mse": (stage.model(torch.randn(5, 3)) - 1).square().mean()}

    return loss


def trained(stage):
    stage.use_average()
    return torch.cat([p.detach().flatten() for p in stage.learner.parameters])


@pytest.mark.parametrize("stop_at", [0, 13, STEPS - 1])
def test_stopped_and_resumed_is_bit_identical(tmp_path, stop_at):
    whole = make(tmp_path / "whole")
    whole.run(loss_of(whole))
    stopped = make(tmp_path / "stopped")
    if stop_at < STEPS - 1:
        with pytest.raises(SystemExit, match=rf"stopped at step {stop_at + 1} of {STEPS}"):
            stopped.run(loss_of(stopped, stop_at))
    else:
        stopped.run(loss_of(stopped, stop_at))
    resumed = make(tmp_path / "stopped")
    assert resumed.step == stop_at + 1
    if not resumed.done:
        resumed.run(loss_of(resumed))
    assert torch.equal(trained(resumed), trained(whole))


def test_the_signal_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stage = make(tmp_path)
    stage.run(loss_of(stage))
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [schedule(step, 1000, WARM_UP_STEPS, "cosine") for step in range(1000)]
    assert rates[0] < 0.01
    assert max(rates) == 1.0
    assert rates[-1] < 1e-4


def test_the_average_follows_the_weights(tmp_path):
    stage = make(tmp_path)
    start = [p.detach().clone() for p in stage.learner.parameters]
    stage.run(loss_of(stage))
    for first, average, last in zip(start, stage.learner.final, stage.learner.parameters, strict=True):
        assert (average - last).norm() < (first - last).norm()
        assert not torch.equal(average, last)
