"""The kernels of geglu against the reference in float64: the output and both gradients, by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import geglu as kernel
from kernels import ops, reference
from tests.support.kernel_cases import (
    assert_compiles,
    assert_compiles_once,
    assert_float8,
    assert_matches,
    poisoned,
    random,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make(shape, dtype=FP32, bias=True, gradients=True):
    x = random(*shape, dtype=dtype).requires_grad_(gradients)
    return x, random(shape[-1], dtype=dtype, seed=1).requires_grad_(gradients) if bias else None


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((1, 2), FP32, id="one value"),
        pytest.param((6,), FP32, id="one dimension"),
        pytest.param((7, 22), FP32, id="odd halves"),  # the gate does not begin where a vector may
        pytest.param((13, 46), BF16, id="odd halves bf16"),
        pytest.param((7, 22), FP16, id="odd halves fp16"),
        pytest.param((3, 5, 26), FP32, id="three dimensions, primes"),
        pytest.param((2, 3, 2, 16), BF16, id="four dimensions"),
        pytest.param((9, 514), FP32, id="a second tile of one column and of one row"),
        pytest.param((5, 256), FP16, id="two tiles of 64 columns, as SDXL's widths"),
        pytest.param((2100, 2), BF16, id="long and narrow"),
    ],
)
def test_outputs_and_gradients(shape, dtype, bias):
    out = assert_matches("geglu", *make(shape, dtype, bias))
    assert out.dtype == dtype and out.is_contiguous()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 22), (2, 5, 128), (2, 3, 5120), (1025, 6)], ids=str)
def test_in_float8(shape, dtype, bias):
    x, bias = make(shape, dtype, bias, gradients=False)
    with ops.use_backend("triton"), poisoned():
        made = ops.geglu(x, bias, float8=True)
    assert_float8(made, reference.geglu(x.double(), None if bias is None else bias.double()))


def test_float8_of_rows_that_lie_apart():
    wide, bias = make((4, 6, 42), gradients=False)
    for x in (wide[:, ::2, :14], wide[..., ::3]):
        with ops.use_backend("triton"):
            made = ops.geglu(x, bias[:14], float8=True)
        assert_float8(made, reference.geglu(x.double(), bias[:14].double()))


def test_float8_has_no_gradient_and_compiles():
    x, bias = make((3, 14))
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="no gradient"):
        ops.geglu(x, bias, float8=True)
    assert_compiles(
        lambda x: tuple(part.float() for part in ops.geglu(x, bias.detach(), float8=True)), x.detach()
    )


CUTS = {
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "a slice of columns": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[:, 3:-2],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "three dimensions, the first two swapped": lambda x: x.view(2, 3, -1).mT.contiguous().mT.transpose(0, 1),
    "one row expanded": lambda x: x[:1].expand(6, -1),
}


@pytest.mark.parametrize("cut", CUTS)
def test_slices(cut):
    x, bias = make((6, 14), gradients=False)
    assert_matches("geglu", CUTS[cut](x).requires_grad_(), bias.requires_grad_())


def test_a_bias_may_be_strided_or_expanded():
    x, bias = make((3, 14))
    assert_matches("geglu", x, bias.detach().repeat_interleave(2)[::2].requires_grad_())
    assert_matches("geglu", x, random(1).expand(14).requires_grad_())


def test_an_expanded_gradient():
    assert_matches("geglu", *make((3, 4, 14)), gradients=lambda out: random(1).expand_as(out))


@pytest.mark.parametrize("which", ["x", "bias"])
def test_only_what_requires_a_gradient_gets_one(which):
    x, bias = make((3, 14), gradients=False)
    (x if which == "x" else bias).requires_grad_()
    assert_matches("geglu", x, bias)


def test_large_gates():
    """Where the normal distribution is 0 or 1 to the last bit, and its density nothing."""
    x, bias = make((5, 14), gradients=False)
    x[:, 7:] *= 30
    assert_matches("geglu", x.requires_grad_(), bias)


@settings(max_examples=10)
@given(
    lead=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    half=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from([FP32, BF16, FP16]),
)
def test_any_shape(lead, half, bias, dtype):
    assert_matches("geglu", *make((*lead, 2 * half), dtype, bias))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_operators_are_registered_well(bias):
    torch.library.opcheck(kernel.geglu_op, make((3, 14), bias=bias))
    x, b = make((3, 14), bias=bias, gradients=False)
    torch.library.opcheck(kernel.geglu_backward_op, (torch.ones_like(x[:, :7]), x, b))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_compiles(bias):
    def function(x, *bias):
        return ops.geglu(x * 2, *bias) + 1

    assert_compiles(function, *(t for t in make((2, 3, 14), bias=bias) if t is not None))


def test_compiles_once_for_all_sizes():
    assert_compiles_once(ops.geglu, *(make((rows, 2 * half)) for rows, half in ((2, 7), (3, 11))))


@pytest.mark.parametrize("shape", [(0, 6), (3, 0)], ids=str)
def test_nothing(shape):
    with ops.use_backend("triton"):
        assert ops.geglu(random(*shape)).shape == (shape[0], shape[1] // 2)
