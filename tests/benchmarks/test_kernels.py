"""benchmarks.kernels: a provider is timed where it is right, and a row says so where it is not."""

import os

import torch

from benchmarks import kernels
from benchmarks.gpu.rows import Budget, Table
from benchmarks.kernel_cases import PLAIN, geglu_case, guidance_case, plain_geglu
from kernels.launching import tuning

CPU = torch.device("cpu")


def table(tmp_path):
    return Table(tmp_path / "kernels.csv", kernels.FIELDS + kernels.STATE)


def case():
    return geglu_case(CPU, torch.float32, 4, 8)


def test_a_provider_has_a_row_for_each_direction(tmp_path):
    rows = table(tmp_path)
    kernels.measure(rows, Budget(60), case(), "eager", plain_geglu, "fp32")
    forward, backward = rows.rows.values()
    assert (forward["direction"], backward["direction"]) == ("forward", "forward+backward")
    assert float(forward["p50_us"]) > 0 and forward["share_of_copy"] and not backward["share_of_copy"]


def test_a_wrong_result_is_not_timed(tmp_path):
    rows = table(tmp_path)
    kernels.measure(rows, Budget(60), case(), "ours", lambda x, bias: plain_geglu(x, bias) * 1.5, "fp32")
    for row in rows.rows.values():
        assert row["note"] == "RuntimeError: relative error 5.0e-01: it is not timed" and not row["p50_us"]


def test_all_cases_are_made(monkeypatch):
    monkeypatch.setattr(kernels, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(kernels, "ON_GPU", True)
    found = list(kernels.all_cases(torch.bfloat16, [1, 4], 1024))
    assert {case.op for case in found} == set(PLAIN)
    assert max(case.bytes_moved for case in found) > 2**28  # what no cache holds


def test_tuned_sizes_are_measured_apart_and_kept_beside_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(kernels, "all_cases", lambda *_: [case(), guidance_case(CPU, torch.float32, 1, 4)])
    kernels.run_tuned(tmp_path, Budget(60), "fp32", [1], 32)
    rows = table(tmp_path).rows.values()
    assert {(row["op"], row["provider"]) for row in rows} == {("geglu", "ours, tuned")}
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path) and os.environ[tuning.VARIABLE] == "1"


def test_without_a_gpu_it_is_refused(tmp_path, capsys):
    if torch.cuda.is_available():
        return
    assert kernels.main(["--out", str(tmp_path)]) == 2
    assert "kernels: a CUDA device is needed" in capsys.readouterr().err
