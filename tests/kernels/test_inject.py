"""The kernels of inject against the reference in float64: every output and every gradient, by name."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import inject as kernel
from kernels import ops
from tests.support.kernel_cases import (
    CUTS,
    DEVICE,
    NCHW,
    NHWC,
    assert_compiles,
    assert_compiles_once,
    assert_matches,
    poisoned,
    random,
    uniform,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Case:
    size: tuple[int, int, int]  # C, H, W
    rows: list[tuple[int, int | None]]  # of each region's feature and mask; None: no mask
    halves: int = 1  # of guidance
    batch: int = 1
    dtype: torch.dtype = FP32
    layout: torch.memory_format = NCHW

    def make(self, gradients: bool = True):
        """hidden, features, masks, scales."""
        options = {"dtype": self.dtype, "layout": self.layout}
        hidden = random(self.halves * self.batch, *self.size, **options).requires_grad_(gradients)
        features = [
            random(n, *self.size, **options, seed=1 + r).requires_grad_(gradients)
            for r, (n, _) in enumerate(self.rows)
        ]
        masks = [
            None if n is None else uniform(n, 1, *self.size[1:], dtype=self.dtype, seed=50 + r)
            for r, (_, n) in enumerate(self.rows)
        ]
        return hidden, features, masks, torch.linspace(-0.5, 1.5, len(self.rows), device=DEVICE)


CASES = {
    "one pixel, one channel": Case((1, 1, 1), [(1, 1)]),
    "primes": Case((13, 7, 11), [(1, 1)], halves=2),
    "primes, nhwc": Case((13, 7, 11), [(1, 1)], halves=2, layout=NHWC),
    "three halves: one program each": Case((5, 3, 4), [(1, 1), (1, None)], halves=3, dtype=BF16),
    "four halves: two programs": Case((5, 3, 4), [(1, 1)], halves=4, dtype=FP16, layout=NHWC),
    "rows of every kind": Case((6, 3, 5), [(3, 1), (1, 3), (3, 3), (1, 1)], 2, 3),
    "rows of every kind, nhwc bf16": Case((6, 3, 5), [(3, 1), (1, 3), (3, 3), (1, 1)], 2, 3, BF16, NHWC),
    "rows of every kind, nchw fp16": Case((6, 3, 5), [(3, 1), (1, 3), (3, 3), (1, 1)], 1, 3, FP16),
    "only a mask has the batch": Case((4, 2, 3), [(1, 1), (1, 2), (1, None)], 2, 2, FP16, NHWC),
    "no mask at all": Case((4, 2, 3), [(2, None), (1, None)], 1, 2, BF16, NHWC),
    "two pixel tiles, the second nearly empty": Case((3, 19, 27), [(1, 1)]),  # 513 pixels
    "two channel tiles, the second nearly empty": Case((257, 2, 3), [(1, 1)], halves=2, layout=NHWC),
    "channels of SDXL, a multiple of 64": Case((128, 3, 3), [(1, 1)], 2, 1, BF16, NHWC),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    hidden, *rest = CASES[name].make()
    out = assert_matches("inject", hidden, *rest)
    assert out.dtype == hidden.dtype and out.stride() == hidden.stride()


@pytest.mark.parametrize("regions", range(10))
def test_regions(regions):
    """Nine take two launches; some have no mask, so that the list of pointers has gaps."""
    rows = [(1 + r % 2, (1, 2, None)[r % 3]) for r in range(regions)]
    assert_matches("inject", *Case((3, 2, 3), rows, 2, 2).make())


def test_masks_none_is_everywhere():
    hidden, features, _, scales = CASES["rows of every kind"].make()
    assert_matches("inject", hidden, features, None, scales)


@pytest.mark.parametrize("dtypes", [(BF16, FP32, FP16), (FP32, BF16, FP32), (FP16, FP16, FP32)], ids=str)
def test_dtypes_may_differ(dtypes):
    """A float32 adapter beside a bfloat16 UNet, float32 masks."""
    of_hidden, of_features, of_masks = dtypes
    hidden, features, masks, scales = CASES["rows of every kind"].make(gradients=False)
    hidden = hidden.to(of_hidden).requires_grad_()
    features = [f.to(of_features).requires_grad_() for f in features]
    assert_matches("inject", hidden, features, [m.to(of_masks) for m in masks], scales.to(of_masks))


@pytest.mark.parametrize("layouts", [(NCHW, NHWC), (NHWC, NCHW)], ids=["nchw + nhwc", "nhwc + nchw"])
def test_layouts_may_differ(layouts):
    hidden, features, *rest = CASES["rows of every kind"].make(gradients=False)
    hidden = hidden.contiguous(memory_format=layouts[0]).requires_grad_()
    features = [f.contiguous(memory_format=layouts[1]).requires_grad_() for f in features]
    assert_matches("inject", hidden, features, *rest)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("cut", CUTS)
def test_slices(cut, layout):
    """The base around a slice is NaN: what is read beside it would be found."""
    cut = CUTS[cut]
    hidden, features, masks, scales = Case((4, 3, 5), [(2, 2), (1, 1)], 2, 2, FP32, layout).make(False)
    hidden, features = cut(hidden).requires_grad_(), [cut(f).requires_grad_() for f in features]
    assert_matches("inject", hidden, features, [cut(m) for m in masks], scales)


def test_expanded_arguments_and_gradients():
    """Stride 0: over the batch, as for one prompt and several images, and everywhere, as after sum()."""
    hidden = random(1, 4, 3, 5).expand(4, -1, -1, -1).requires_grad_()
    features = [
        random(1, 4, 3, 5, seed=1).expand(2, -1, -1, -1),
        random(2, 1, 1, 1, seed=2).expand(-1, 4, 3, 5),
    ]
    masks = [uniform(1, 1, 3, 5).expand(2, -1, -1, -1), uniform(1, 1, 1, 1).expand(-1, -1, 3, 5)]
    assert_matches(
        "inject",
        hidden,
        [f.requires_grad_() for f in features],
        masks,
        torch.ones(1, device=DEVICE).expand(2),
        gradients=lambda out: random(1).expand_as(out),
    )


def test_strengths_may_be_a_column_of_a_schedule():
    hidden, features, masks, _ = CASES["rows of every kind"].make()
    schedule = random(4, 3)
    assert_matches("inject", hidden, features, masks, schedule[:, 1])


def test_only_what_requires_a_gradient_gets_one():
    hidden, features, masks, scales = CASES["rows of every kind"].make(gradients=False)
    assert_matches("inject", hidden.clone().requires_grad_(), features, masks, scales)
    features[2].requires_grad_()
    assert_matches("inject", hidden, features, masks, scales)


@pytest.mark.parametrize(
    "cut", [None, "channel slice", "column slice", "batch slice", "rows between channels"]
)
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_in_place(cut, layout):
    hidden, *rest = Case((4, 3, 5), [(1, 1), (2, None)], 2, 2, FP32, layout).make(gradients=False)
    hidden = CUTS[cut](hidden) if cut else hidden
    expected = assert_matches("inject", hidden, *rest)
    whole = hidden._base if hidden._base is not None else hidden
    beside = whole.isnan().sum()
    with ops.use_backend("triton"), poisoned():
        out = ops.inject(hidden, *rest, inplace=True)
    assert out is hidden and torch.equal(hidden, expected)
    assert whole.isnan().sum() == beside


def test_in_place_under_autograd():
    leaf, features, masks, scales = CASES["rows of every kind"].make()
    with ops.use_backend("triton"), poisoned():
        hidden = leaf * 1
        out = ops.inject(hidden, features, masks, scales, inplace=True)
        gradient = random(*out.shape, seed=70)
        found = torch.autograd.grad(out, [leaf, *features], gradient)
        wanted = torch.autograd.grad(ops.inject(leaf, features, masks, scales), [leaf, *features], gradient)
    assert out is hidden
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


SHARED = {  # the sum's other arguments, in the memory of hidden (4, 4, 3, 5)
    "a feature of one row": lambda h: ([h[:1]], [uniform(2, 1, 3, 5)], random(1)),
    "nine features, of two launches": lambda h: ([h] * 9, None, random(9)),
    "a mask": lambda h: ([random(1, 4, 3, 5)], [h[:1, :1]], random(1)),
    "the strengths": lambda h: ([random(1, 4, 3, 5)], None, h.flatten()[:1]),
}


@pytest.mark.parametrize("name", SHARED)
def test_in_place_beside_itself(name):
    """Nothing is read after it was written: the sum is that of the values before."""
    hidden = random(4, 4, 3, 5, seed=9)
    with ops.use_backend("triton"):
        expected = ops.inject(hidden, *SHARED[name](hidden))
        assert ops.inject(hidden, *SHARED[name](hidden), inplace=True) is hidden
    assert torch.equal(hidden, expected)


def test_in_place_is_seen_by_autograd():
    """A value that a gradient needs is not changed behind its back."""
    saved = random(2, 4, 3, 5).requires_grad_().exp()
    with torch.no_grad(), ops.use_backend("triton"):
        ops.inject(saved, [random(1, 4, 3, 5)], None, random(1), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_no_strength_or_no_mask_changes_no_bit(dtype, inplace):
    hidden, features, masks, scales = Case((5, 3, 7), [(1, 1), (2, 2)], 2, 2, dtype).make(gradients=False)
    before = hidden.clone()
    masks[0][..., 3:] = 0
    masks[1].zero_()
    with ops.use_backend("triton"), poisoned():
        off = ops.inject(hidden, features, [None, None], torch.zeros_like(scales), inplace=inplace)
        assert torch.equal(off, before)
        out = ops.inject(hidden, features, masks, torch.ones_like(scales), inplace=inplace)
    assert torch.equal(out[..., 3:], before[..., 3:])
    assert not torch.equal(out[..., :3], before[..., :3])


@settings(max_examples=10)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    rows=st.lists(st.tuples(st.booleans(), st.sampled_from([None, False, True])), min_size=1, max_size=4),
    halves=st.integers(1, 3),
    batch=st.integers(1, 3),
    layout=st.sampled_from([NCHW, NHWC]),
)
def test_any_shape(size, rows, halves, batch, layout):
    counts = [(batch if f else 1, None if m is None else batch if m else 1) for f, m in rows]
    counts[0] = batch, counts[0][1]  # something has the batch
    assert_matches("inject", *Case(size, counts, halves, batch, FP32, layout).make())


def test_operators_are_registered_well():
    case = Case((2, 2, 3), [(1, 1), (2, None)], 2, 2)
    torch.library.opcheck(kernel.inject_op, case.make())
    hidden, features, masks, scales = case.make(gradients=False)
    torch.library.opcheck(kernel.inject_op_, (hidden, features, masks, scales))
    torch.library.opcheck(kernel.inject_backward_op, (hidden, features, masks, scales))


def test_compiles():
    hidden, features, masks, scales = CASES["rows of every kind"].make()

    def function(hidden, first, second, mask, scales):
        return ops.inject(hidden * 2, [first, second], [mask, None], scales[:2]) + 1

    assert_compiles(function, hidden, *features[:2], masks[0], scales)


def test_compiles_in_place():
    hidden, features, masks, scales = CASES["rows of every kind"].make(gradients=False)

    def function(hidden, feature, mask, scales):
        return ops.inject(hidden, [feature], [mask], scales[:1], inplace=True) + 1

    assert_compiles(function, hidden, features[0], masks[0], scales)


def test_compiles_once_for_all_sizes():
    def function(hidden, feature, mask, scales):
        return ops.inject(hidden, [feature], [mask], scales)

    cases = [Case((3, 2, width), [(batch, 1)], 2, batch) for batch, width in ((11, 5), (13, 7))]
    calls = [case.make() for case in cases]
    assert_compiles_once(function, *((h, *features, *masks, s) for h, features, masks, s in calls))


def test_nothing_to_add_to():
    with ops.use_backend("triton"):
        feature = random(1, 3, 2, 5).requires_grad_()
        out = ops.inject(torch.zeros(0, 3, 2, 5, device=DEVICE), [feature], None, random(1))
        out.sum().backward()
    assert out.shape == (0, 3, 2, 5) and (feature.grad == 0).all()
