"""training.loop.learner: steps, and a state that goes on to the same bits."""

import pytest
import torch

from training.config import TrainConfig
from training.loop.controls import new_adapter
from training.loop.learner import Learned, Learner
from training.loop.optimize import make_optimizer

SIZE = 32, 32, 32, 32
CONFIG = TrainConfig(lr=1e-2)


def learner_of(adapter, decay=0.9):
    return Learner(
        dict(adapter.named_parameters()), make_optimizer(list(adapter.parameters()), CONFIG), decay
    )


def take(learner, adapter, steps, use=True):
    """Take steps whose gradients depend on the weights alone."""

    def backward():
        sum(f.square().mean() for f in adapter(torch.ones(1, 1, 32, 32))).backward()
        return learner.step

    return [learner.take_step(CONFIG.lr, backward, lambda: use) for _ in range(steps)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_restored_learner_goes_on_to_the_same_bits(layout):
    """Fused AdamW walks through memory: a state that lies otherwise than its parameter would be applied to others."""
    torch.manual_seed(0)
    ours, other = (new_adapter(SIZE, 1, 1).to(memory_format=layout) for _ in range(2))
    first, second = learner_of(ours), learner_of(other)
    take(first, ours, 2)
    state = first.state()
    assert all(t.is_contiguous() for named in state for t in named.values())
    second.restore(first.step, state)
    assert take(first, ours, 2) == take(second, other, 2) == [2, 3]
    for mine, theirs in zip(first.parameters + first.final, second.parameters + second.final, strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_that_are_not_to_be_used_count_as_a_step_and_change_nothing():
    adapter = new_adapter(SIZE, 1, 1)
    before = [p.detach().clone() for p in adapter.parameters()]
    learner = learner_of(adapter, decay=0)
    take(learner, adapter, 1, use=False)
    assert learner.step == 1 and all(p.grad is None for p in learner.parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.final, strict=True))


def test_an_average_that_a_state_lacks_starts_at_its_weights():
    adapter = new_adapter(SIZE, 1, 1)
    learner = learner_of(adapter)
    take(learner, adapter, 2)
    weights, _, optimizer = learner.state()
    learner.restore(2, Learned(weights, {}, optimizer))
    assert all(torch.equal(a, p) for a, p in zip(learner.final, learner.parameters, strict=True))
