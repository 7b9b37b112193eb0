"""The quick GroupNorm has nn.GroupNorm's values and gradients."""

import pytest
import torch
from torch import nn

from tests.support.tolerances import assert_close
from training.loop.group_norm import GroupNorm, use_quick_group_norm


@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (1, 8, 1, 1), (3, 12, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(shape, dtype):
    x = (
        (torch.randn(shape, dtype=torch.float64) * 2 + 1)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
    )
    gradient = torch.randn(shape, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(shape[1], dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)

    def run(cls, dtype):
        norm = cls(4, shape[1]).to(torch.promote_types(dtype, torch.float32))
        norm.weight.data.copy_(weight)
        norm.bias.data.copy_(bias)
        leaf = x.detach().to(dtype).requires_grad_()
        y = norm(leaf)
        y.backward(gradient.to(dtype))
        return y, leaf.grad, norm.weight.grad, norm.bias.grad

    names = ("y", "x gradient", "weight gradient", "bias gradient")
    for name, actual, expected in zip(
        names, run(GroupNorm, dtype), run(nn.GroupNorm, torch.float64), strict=True
    ):
        if name == "x gradient" and shape[2] == 1:
            assert (
                actual.double() - expected
            ).abs().max() < 0.2  # two values a group: the true gradient is near 0
            continue
        # parameter gradients of a bf16 input are sums of bf16 products, kept in float32
        wide = actual.to(dtype) if dtype == torch.bfloat16 else actual
        assert_close(name, wide, expected, "op" if name == "y" else "gradient")


def test_it_takes_the_place_of_nn_group_norm():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8))
    names = list(model.state_dict())
    assert isinstance(use_quick_group_norm(model)[1], GroupNorm)
    assert list(model.state_dict()) == names
    tokens = torch.randn(2, 8, 5)  # other inputs go nn.GroupNorm's way
    assert torch.equal(model[1](tokens), nn.GroupNorm(2, 8)(tokens))


def test_no_second_derivative_is_given():
    """It would be a wrong one: the first knows the statistics as numbers."""
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(GroupNorm(2, 4)(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
