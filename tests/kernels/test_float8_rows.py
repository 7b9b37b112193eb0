"""The kernel of float8_rows against the reference: the same bits."""

import pytest
import torch

from kernels import ops, reference
from kernels.reference import FLOAT8, FLOAT8_LARGEST
from tests.support.kernel_cases import DEVICE, assert_compiles, poisoned, random

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def on_cpu(x):
    """On CUDA PyTorch divides by a number as it multiplies with its reciprocal: scales are off by a last bit."""
    return reference.float8_rows(x.cpu())


def check(x):
    with ops.use_backend("triton"), poisoned():
        made = ops.float8_rows(x)
    expected = on_cpu(x)
    assert made.values.dtype == FLOAT8 and made.values.shape == x.shape
    assert made.scales.dtype == FP32 and torch.equal(made.scales.cpu(), expected.scales)
    assert torch.equal(made.values.view(torch.uint8).cpu(), expected.values.view(torch.uint8))
    return made


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (2, 3, 320), (1, 2, 2560), (1025, 3)], ids=str)
def test_outputs(shape, dtype):
    made = check(random(*shape, dtype=dtype))
    assert made.values.float().abs().amax(-1).unique().tolist() == [FLOAT8_LARGEST]


def test_each_row_has_its_own_scale():
    x = random(5, 64) * torch.tensor([1e-3, 1.0, 1e3, 1e-20, 0.0], device=DEVICE)[:, None]
    made = check(x)
    assert not made.values[4].float().any()


def test_rows_may_lie_apart():
    wide = random(4, 6, 24)
    check(wide[:, ::2, :8])
    check(wide[..., ::3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x = random(2, 8)
    x[0, 3] = bad
    with ops.use_backend("triton"):
        values, scales = ops.float8_rows(x)
    product = values.float() * scales
    assert not product[0, 3].isfinite() and product[1].isfinite().all()


def test_no_rows():
    with ops.use_backend("triton"):
        values, scales = ops.float8_rows(random(0, 8))
    assert values.shape == (0, 8) and scales.shape == (0, 1)


def test_compiles():
    assert_compiles(lambda x: tuple(part.float() for part in ops.float8_rows(x)), random(2, 3, 16))


@pytest.mark.parametrize("x", [torch.ones(()), torch.ones(2, 0), torch.ones(2, 4, dtype=torch.int32)])
def test_what_has_no_rows_is_refused(x):
    with pytest.raises(ValueError, match=r"^float8_rows: x must be a float \(..., C\)"):
        ops.float8_rows(x)


def test_an_older_gpu_takes_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    gpu = torch.device("cuda")
    assert ops._is_recent(gpu, ops.OLDEST_GPU) and not ops._is_recent(gpu, ops.FLOAT8_GPU)
