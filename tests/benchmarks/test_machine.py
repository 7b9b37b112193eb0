"""benchmarks.machine: the head of a log says on what machine it was written."""

import torch

from benchmarks import machine
from tests.support import cpus


def test_processor_instructions_rates_and_versions(capsys, monkeypatch):
    monkeypatch.setattr(machine, "product_seconds", dict.fromkeys(machine.DTYPES.values(), 0.001).__getitem__)
    cpus.pretend(cpus.KINDS[0], monkeypatch)
    assert machine.main() == 0
    lines = {line[:12].strip(): line[13:] for line in capsys.readouterr().out.splitlines()}
    assert "GiB of memory" in lines["processor"] and lines["PyTorch uses"]
    assert lines["fp32"] == "33.6 GFLOP/s in a 256 x 256 product"
    assert lines["bf16"].endswith(", slower than fp32") and lines["fp16"].endswith(", slower than fp32")
    assert f"torch {torch.__version__}" in lines["versions"] and "triton " in lines["versions"]
    assert lines["commit"]


def test_instructions_of_a_processor(monkeypatch):
    text = "processor : 0\nmodel name : A CPU\nflags : fpu avx2 avx512f amx_tile\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda *_, **__: text)
    assert machine.instructions() == ["avx2", "avx512f", "amx_tile"]


def test_a_system_that_does_not_tell(monkeypatch):
    def refuse(*_, **__):
        raise OSError

    monkeypatch.setattr(machine.Path, "read_text", refuse)
    assert machine.instructions() == []
