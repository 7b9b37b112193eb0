"""runtime.machine.arithmetic: which data type is chosen on which kind of CPU, and what is said of a slow one."""

import warnings

import pytest
import torch

from benchmarks.measure import default_dtypes, matmul_rate
from runtime.machine import arithmetic
from runtime.machine.arithmetic import half_precision, is_quick, name_of, warn_if_slow
from runtime.machine.device import pick_dtype
from tests.support import cpus
from training.embedded import stage

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=cpus.KINDS, ids=lambda kind: kind.name)
def kind(request, monkeypatch):
    return cpus.pretend(request.param, monkeypatch)


def test_the_choice_on_each_kind_of_cpu(kind):
    assert is_quick(torch.float32, CPU)
    assert is_quick(torch.bfloat16, CPU) is kind.bf16
    assert is_quick(torch.float16, CPU) is kind.fp16
    assert half_precision(CPU) == (torch.bfloat16 if kind.bf16 else torch.float32)
    assert default_dtypes(CPU) == (["fp32", "bf16"] if kind.bf16 else ["fp32"])
    assert pick_dtype(None, CPU) == torch.float32


def test_a_gpu_is_not_asked_of_the_cpu(kind):
    assert is_quick(torch.bfloat16, CUDA) and is_quick(torch.float16, CUDA)
    assert half_precision(CUDA) == torch.bfloat16 and default_dtypes(CUDA) == ["fp32", "bf16"]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_slow_type_that_is_asked_for_is_taken_with_one_line(kind, name, dtype):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert pick_dtype(name, CPU) == dtype
    if is_quick(dtype, CPU):
        assert not said
    else:
        times = kind.seconds[dtype] / kind.seconds[torch.float32]
        expected = f"dtype {name}: this CPU takes at least {times:.0f} times as long for a product as in fp32; use fp32"
        assert [str(w.message).startswith(expected) for w in said] == [True]


def test_float32_says_nothing(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_slow(torch.float32, CPU)
        warn_if_slow(torch.bfloat16, CUDA)


def test_the_embedded_build_takes_what_is_quick(kind):
    with stage.autocast():
        assert torch.is_autocast_enabled("cpu") is kind.bf16


def test_a_product_is_timed_once_a_process():
    arithmetic.product_seconds.cache_clear()
    first = arithmetic.product_seconds(torch.float32)
    assert 0 < first < 1 and arithmetic.product_seconds(torch.float32) is first
    assert arithmetic.slowdown(torch.float32) == 1


def test_names():
    assert [name_of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [
        "fp32",
        "bf16",
        "fp16",
    ]
    assert name_of(torch.int8) == "int8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rate_of_matrix_products_is_plausible_and_soon_known(dtype):
    """Sizes grow only while they are quick: 4096 x 4096 in bfloat16 takes minutes on a CPU with AVX2 alone."""
    assert 0.0001 < matmul_rate(dtype, CPU, repeats=1, limit=0.5) < 100
