"""The kernels of group_norm_silu against the reference in float64: the output and every gradient, by name."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import group_norm_gradient as gradient
from kernels import group_norm_silu as kernel
from kernels import ops, reference
from kernels.launching import launch, tuning
from tests.support.kernel_cases import (
    CUTS,
    NCHW,
    NHWC,
    assert_compiles,
    assert_compiles_once,
    assert_matches,
    poisoned,
    random,
)
from tests.support.tolerances import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Case:
    shape: tuple[int, int, int, int]  # B, C, H, W
    groups: int
    dtype: torch.dtype = FP32
    layout: torch.memory_format = NHWC
    silu: bool = True

    def make(self, gradients: str = "x weight bias", mean: float = 0.5):
        """x, weight, bias, num_groups, eps, silu."""
        channels = self.shape[1]
        tensors = {
            "x": random(*self.shape, dtype=self.dtype, layout=self.layout) + mean,
            "weight": random(channels, dtype=self.dtype, seed=1) + 1,
            "bias": random(channels, dtype=self.dtype, seed=2),
        }
        for name in gradients.split():
            tensors[name].requires_grad_()
        return *tensors.values(), self.groups, 1e-5, self.silu


CASES = {
    "one pixel": Case((1, 6, 1, 1), 2),
    "width 1": Case((2, 6, 3, 5), 6),
    "width 1, nchw": Case((2, 6, 3, 5), 6, layout=NCHW),
    "width 10, as SDXL's 320 channels": Case((1, 80, 5, 7), 8),
    "width 10, nchw bf16 without silu": Case((2, 40, 5, 7), 4, BF16, NCHW, False),
    "width 10, nhwc bf16: eight groups a block": Case((1, 160, 3, 5), 16, BF16),
    "width 20, as 640 channels, fp16": Case((2, 80, 3, 5), 4, FP16),
    "width 20, nchw without silu": Case((1, 60, 3, 5), 3, FP32, NCHW, False),
    "width 30, as 960 channels, bf16": Case((1, 120, 3, 5), 4, BF16, NHWC, False),
    "width 30, nchw fp16": Case((1, 60, 5, 3), 2, FP16, NCHW),
    "one group of a prime": Case((2, 13, 7, 11), 1),
    "groups of a prime number: blocks of one": Case((1, 35, 3, 5), 7),
    "six chunks, the last nearly empty": Case((1, 40, 23, 7), 4),  # blocks of 32 pixels, 161 in all
    "chunks, nchw": Case((1, 40, 17, 23), 4, layout=NCHW),  # blocks of 128 pixels, 391 in all
    "chunks of two blocks": Case((1, 64, 67, 32), 1, BF16),  # 67 blocks of 32 pixels, 64 chunks at most
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    args = CASES[name].make()
    out = assert_matches("group_norm_silu", *args)
    assert out.dtype == args[0].dtype and out.stride() == args[0].stride()


@pytest.mark.parametrize(
    ("name", "chunks"),
    [("one group of a prime", 1), ("six chunks, the last nearly empty", 6), ("chunks of two blocks", 34)],
)
def test_cases_have_the_chunks_they_are_for(name, chunks):
    case = CASES[name]
    x = case.make()[0]
    batch, channels, height, width = case.shape
    inner = launch.channels_inner(launch.as_pixels(x)[1])
    sizes = launch.group_blocks(batch, height * width, channels, case.groups, inner, x.itemsize)
    assert -(-height * width // sizes["chunk"]) == chunks


def test_every_size_that_tuning_tries_is_right():
    x, weight, bias, groups, eps, silu = Case((1, 40, 23, 7), 4).make("")
    default = launch.group_blocks(1, 23 * 7, 40, groups, True, x.itemsize)
    grad, found = random(1, 40, 23, 7, seed=9), []
    for sizes in tuning.candidates(default):
        out, statistics = kernel.group_norm_silu_fwd(x, weight, bias, groups, eps, silu, None, sizes)
        back = grad, x, weight, bias, statistics, silu, True, None
        found.append((out, *gradient.group_norm_silu_bwd(*back, sizes)))
    assert len(found) == 16
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert_close("another size", same, one)


@pytest.mark.parametrize("gradients", ["x", "weight", "bias", "weight bias"])
def test_only_what_requires_a_gradient_gets_one(gradients):
    """In NCHW: on the CPU PyTorch's own backward, here the reference, crashes in NHWC where x is constant."""
    assert_matches("group_norm_silu", *Case((2, 8, 3, 5), 2, layout=NCHW).make(gradients))


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_a_large_mean_costs_no_more_than_its_own_rounding(layout):
    """E[x^2] - E[x]^2 would be off by some percent here: a float32 near 1e6 has steps of 1/16."""
    x, weight, bias, *rest = Case((1, 40, 23, 7), 4, layout=layout, silu=False).make("", mean=1000)
    args = torch.ones_like(weight), torch.zeros_like(bias), *rest
    with ops.use_backend("triton"), poisoned():
        out = ops.group_norm_silu(x, *args)
    exact = reference.group_norm_silu(x.double(), *(t.double() for t in args[:2]), *rest)
    step = 2**-14  # of a float32 near 1000, where the standard deviation is 1
    assert (out - exact).abs().max() < 2 * step


def test_a_constant_image_gives_the_bias():
    x, weight, bias, *rest = Case((1, 8, 3, 5), 2).make()
    x = torch.full_like(x, 3.0).requires_grad_()
    out = assert_matches("group_norm_silu", x, weight, bias, *rest[:-1], False)
    assert torch.equal(out, bias.expand(1, 3, 5, 8).permute(0, 3, 1, 2))


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("cut", CUTS)
def test_slices(cut, layout):
    """The base around a slice is NaN: what is read beside it would be found."""
    x, *rest = Case((2, 6, 3, 5), 2, layout=layout).make("weight bias")
    assert_matches("group_norm_silu", CUTS[cut](x).requires_grad_(), *rest)


def test_expanded_arguments_and_gradients():
    _, weight, bias, *rest = Case((3, 6, 3, 5), 2).make("")
    args = [
        random(1, 6, 3, 5).expand(3, -1, -1, -1),
        weight.repeat_interleave(2)[::2],  # a column of a table
        bias[:1].expand(6),
    ]
    args = [t.requires_grad_() for t in args]
    assert_matches("group_norm_silu", *args, *rest, gradients=lambda out: random(1).expand_as(out))


def test_parameters_may_be_float32_beside_bfloat16():
    x, weight, bias, *rest = Case((2, 20, 3, 5), 2).make("")
    args = [t.requires_grad_() for t in (x.bfloat16(), weight, bias)]
    assert_matches("group_norm_silu", *args, *rest)


def test_eps_and_defaults():
    x, weight, bias, groups, *_ = Case((1, 8, 3, 5), 2).make()
    assert_matches("group_norm_silu", x * 1e-3, weight, bias, groups)
    assert_matches("group_norm_silu", x * 1e-3, weight, bias, groups, eps=1e-6)


def offsets(rows: int, channels: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Large beside x, in every way that rows may lie in memory."""
    rows = random(rows, channels, dtype=dtype, seed=3) * 10
    return {
        "a row each": rows,
        "one row": rows[:1],
        "expanded": rows[:1].expand(rows.shape),
        "rows of a table": rows.repeat_interleave(3, 0)[::3],
        "columns of a table": rows.repeat_interleave(2, 1)[:, ::2],
    }


@pytest.mark.parametrize("lies", offsets(1, 1, FP32))
@pytest.mark.parametrize(
    "name",
    [
        "width 10, nhwc bf16: eight groups a block",
        "width 20, nchw without silu",
        "chunks, nchw",
        "width 30, as 960 channels, bf16",
    ],
)
def test_an_offset(name, lies):
    case = CASES[name]
    case = Case((2, *case.shape[1:]), case.groups, case.dtype, case.layout, case.silu)
    assert_matches("group_norm_silu", *case.make(), offset=offsets(2, case.shape[1], case.dtype)[lies])


def test_an_offset_beside_parameters_of_another_dtype():
    args = Case((2, 20, 3, 5), 2, BF16).make()
    assert_matches("group_norm_silu", *args, offset=offsets(2, 20, FP32)["a row each"])


def test_an_offset_has_no_gradient():
    args, offset = Case((2, 6, 3, 5), 2).make(), random(2, 6).requires_grad_()
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="no gradient for an argument"):
        ops.group_norm_silu(*args, offset=offset)


@settings(max_examples=10)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    groups=st.integers(1, 6),
    width=st.integers(1, 9),
    layout=st.sampled_from([NCHW, NHWC]),
    silu=st.booleans(),
)
def test_any_shape(size, groups, width, layout, silu):
    batch, *image = size
    if width * image[0] * image[1] < 8:
        width = 8  # normalised, two values are -1 and 1 whatever they were: their gradient is only rounding
    assert_matches(
        "group_norm_silu", *Case((batch, groups * width, *image), groups, FP32, layout, silu).make()
    )


@pytest.mark.parametrize("offset", [None, random(2, 6)], ids=["no offset", "offset"])
@pytest.mark.parametrize("with_parameters", [False, True], ids=["x only", "with parameters"])
def test_operators_are_registered_well(with_parameters, offset):
    case = Case((2, 6, 3, 5), 2)
    args = case.make("x weight bias" if with_parameters else "x")
    torch.library.opcheck(kernel.group_norm_silu_op, (*args, offset))
    x, weight, bias, groups, eps, silu = case.make("")
    statistics = kernel.group_norm_silu_fwd(x, weight, bias, groups, eps, silu, offset)[1]
    backward = torch.ones_like(x), x, weight, bias, statistics, silu, with_parameters, offset
    torch.library.opcheck(kernel.group_norm_silu_backward_op, backward)


def test_compiles():
    def function(x, weight, bias):
        return ops.group_norm_silu(x * 2, weight + 1, bias, 2) + 1

    assert_compiles(function, *Case((2, 6, 3, 5), 2).make()[:3])


def test_compiles_with_an_offset():
    def function(x, weight, bias, offset):
        return ops.group_norm_silu(x, weight, bias, 2, offset=offset + 1)

    assert_compiles(function, *Case((2, 6, 3, 5), 2).make()[:3], random(2, 6))


def test_compiles_once_for_all_sizes():
    def function(x, weight, bias):
        return ops.group_norm_silu(x, weight, bias, 2)

    cases = [Case((batch, 6, 3, width), 2) for batch, width in ((2, 5), (4, 7))]
    assert_compiles_once(function, *(case.make()[:3] for case in cases))


def test_an_empty_batch():
    x, *rest = Case((1, 6, 3, 5), 2).make()
    with ops.use_backend("triton"):
        out = ops.group_norm_silu(x[:0], *rest)
        assert out.shape == (0, 6, 3, 5)
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), rest[:2]))
