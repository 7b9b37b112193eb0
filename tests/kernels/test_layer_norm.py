"""The kernel of add_layer_norm against the reference in float64."""

import pytest
import torch

from kernels import layer_norm as kernel
from kernels import ops, reference
from tests.support.kernel_cases import (
    OUTPUT,
    assert_compiles,
    assert_float8,
    assert_matches,
    poisoned,
    random,
)
from tests.support.tolerances import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(*shape, dtype=FP32, residual=True):
    weight, bias = (random(shape[-1], dtype=dtype, seed=i) for i in (2, 3))
    x = random(*shape, dtype=dtype) + 3
    return x, random(*shape, dtype=dtype, seed=1) if residual else None, weight, bias


def check(x, other, weight, bias):
    """The norm is of the sum as it was rounded."""
    with ops.use_backend("triton"), poisoned():
        total, norm = ops.add_layer_norm(x, other, weight, bias)
    assert_close("sum", total, x.double() if other is None else x.double() + other.double(), OUTPUT)
    wanted = reference.add_layer_norm(total.double(), None, weight.double(), bias.double())[1]
    assert_close("norm", norm, wanted, OUTPUT)
    return total, norm


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (2, 3, 320), (1, 2, 1280), (1025, 3)], ids=str)
def test_outputs(shape, dtype, residual):
    x, other, weight, bias = case(*shape, dtype=dtype, residual=residual)
    total, norm = check(x, other, weight, bias)
    assert total.shape == norm.shape == x.shape and total.dtype == norm.dtype == dtype


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 64), (2, 3, 320), (1, 2, 1280), (1025, 3)], ids=str)
def test_the_norm_in_float8(shape, residual):
    x, other, weight, bias = case(*shape, dtype=BF16, residual=residual)
    with ops.use_backend("triton"), poisoned():
        total, norm = ops.add_layer_norm(x, other, weight, bias, float8=True)
    assert_close("sum", total, x.double() if other is None else x.double() + other.double(), OUTPUT)
    exact = reference.add_layer_norm(total.double(), None, weight.double(), bias.double())[1]
    assert_float8(norm, exact)


def test_rows_may_lie_apart():
    wide, other, weight, bias = case(4, 6, 24)
    check(wide[:, ::2, :8], other[:, ::2, 8:16], weight[:8], bias[:8])
    check(wide[..., ::3], None, weight[:8], bias[:8])


def test_a_mean_far_from_zero_costs_no_precision():
    x, other, weight, bias = case(4, 320)
    check(x + 1000, other, weight, bias)


def test_no_rows():
    with ops.use_backend("triton"):
        total, norm = ops.add_layer_norm(*case(0, 8))
        in_float8 = ops.add_layer_norm(*case(0, 8), float8=True)[1]
    assert total.shape == norm.shape == in_float8.values.shape == (0, 8)


def test_compiles():
    x, other, weight, bias = case(2, 3, 16)
    assert_compiles(lambda x, other: ops.add_layer_norm(x, other, weight, bias), x, other)

    def in_float8(x, other):
        total, norm = ops.add_layer_norm(x, other, weight, bias, float8=True)
        return total, norm.values.float() * norm.scales

    assert_compiles(in_float8, x, other)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (2, 3, 320), (1, 2, 1280), (1025, 3)], ids=str)
def test_gradients(shape, dtype, residual):
    """Of a sum that is exact: what is normalised is the sum as it was rounded."""
    x, other, weight, bias = case(*shape, dtype=dtype, residual=residual)
    x, other = ((t * 8).round() / 8 if t is not None else None for t in (x, other))
    leaves = [t.requires_grad_() for t in (x, other) if t is not None]
    assert_matches("add_layer_norm", x, other, weight, bias)
    assert all(t.requires_grad for t in leaves)


@pytest.mark.parametrize("wanted", ["x", "residual"])
def test_only_what_requires_a_gradient_gets_one(wanted):
    x, other, weight, bias = case(3, 8)
    (x if wanted == "x" else other).requires_grad_()
    assert_matches("add_layer_norm", x, other, weight, bias)


def test_gradients_that_are_expanded_or_of_one_output():
    x, other, weight, bias = case(3, 8)
    leaves = x.requires_grad_(), other.requires_grad_()
    assert_matches("add_layer_norm", *leaves, weight, bias, gradients=lambda t: random(1).expand_as(t))
    for index in (0, 1):
        found = []
        for backend in ("triton", "torch"):
            with ops.use_backend(backend):
                made = ops.add_layer_norm(*leaves, weight, bias)[index]
            found.append(torch.autograd.grad(made, leaves, random(3, 8, seed=5)))
        for one, wanted in zip(*found, strict=True):
            assert_close("gradient", one, wanted.double(), "gradient")


@pytest.mark.parametrize("residual", [True, False])
def test_operators_are_registered_well(residual):
    x, other, weight, bias = case(3, 8, residual=residual)
    args = x.requires_grad_(), None if other is None else other.requires_grad_()
    torch.library.opcheck(kernel.add_layer_norm_op, (*args, weight, bias, 1e-5, False))
    grads = random(3, 8, seed=5) if residual else None, random(3, 8, seed=4)
    torch.library.opcheck(kernel.add_layer_norm_backward_op, (x.detach(), weight, *grads, 1e-5))


def test_compiles_with_gradients():
    x, other, weight, bias = case(2, 3, 16)
    args = x.requires_grad_(), other.requires_grad_()
    assert_compiles(lambda x, other: ops.add_layer_norm(x, other, weight, bias), *args)


def test_what_has_no_gradient():
    x, other, weight, bias = case(2, 8)
    for change in (
        {"weight": weight.clone().requires_grad_()},
        {"x": x.clone().requires_grad_(), "float8": True},
    ):
        call = {"x": x, "residual": other, "weight": weight, "bias": bias} | change
        with ops.use_backend("triton"), pytest.raises(RuntimeError, match="no gradient"):
            ops.add_layer_norm(**call)
    assert ops.add_layer_norm(x, other, weight.requires_grad_(), bias)[1].requires_grad
