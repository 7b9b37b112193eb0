"""benchmarks.kernel_cases: every provider computes what the reference does; what is timed is what is meant."""

import pytest
import torch

from benchmarks import kernels as benchmark
from benchmarks.kernel_cases import KORNIA, PLAIN, cases, guidance_case, inject_case
from kernels import reference

CPU = torch.device("cpu")
CASES = {f"{case.op} {case.shape}": case for case in cases(CPU, torch.float32, [1], size=32)}


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_way_of_doing_without_us_is_right(case):
    inputs = benchmark._each(case.inputs, torch.Tensor.double)
    expected = benchmark._as_tuple(getattr(reference, case.op)(**inputs))
    for run in (PLAIN[case.op], *([KORNIA[case.op]] if case.op in KORNIA else [])):
        actual = benchmark._as_tuple(run(**case.inputs))
        assert all(relative(a, e) < 1e-5 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_wrong_output_is_not_timed(factor):
    case = next(case for case in CASES.values() if case.op == "geglu")
    benchmark.check(case, PLAIN["geglu"])
    with pytest.raises(RuntimeError, match="relative error .*: it is not timed"):
        benchmark.check(case, lambda x, bias: factor * PLAIN["geglu"](x, bias))


def test_bytes_are_every_input_and_output_once():
    case = inject_case(CPU, torch.bfloat16, batch=1, channels=8, edge=4)
    hidden, feature, mask = 2 * 8 * 16 * 2, 8 * 16 * 2, 16 * 4
    assert case.bytes_moved == 2 * hidden + feature + mask
    sample = 4 * 16 * 4
    assert guidance_case(CPU, torch.bfloat16, 1, 4).bytes_moved == 4 * sample + 2 * sample // 2


def test_backward_reaches_every_input_that_has_one():
    case = next(case for case in CASES.values() if case.op == "inject")
    grads = benchmark.with_backward(case, PLAIN["inject"], case.inputs)()
    assert [g.shape for g in grads] == [case.inputs["hidden"].shape, case.inputs["features"][0].shape]
