"""benchmarks.full_size on a small UNet: that it runs, and that its figures are right."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import full_size
from runtime.machine.arithmetic import DTYPES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "cpu"
    return full_size.main(["--small", "--repeats", "1", "--out", str(folder)]), folder


def test_writes_one_row(run):
    code, folder = run
    assert [file.name for file in folder.iterdir()] == ["full_size_small.csv"]
    (row,) = csv.DictReader((folder / "full_size_small.csv").open())
    assert code == 0
    limit = full_size.LIMITS[DTYPES[row["dtype"]]]
    assert 0 < float(row["error_free"]) < limit and 0 < float(row["error_control"]) < limit
    assert 0.1 < float(row["output_rms"]) < 10  # neither dead nor exploded: the comparison means something
    assert min(float(row[key]) for key in ("diffusers_ms", "ours_ms", "peak_memory_gib", "parameters")) > 0
    assert all(row.values()) and float(row["error_packed"]) < limit
    assert float(row["packed_ms"]) > 0 and 0 < float(row["peak_share"]) < 1


def test_fails_where_the_two_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "measure", lambda *_, **__: {"error_free": 0.0, "error_control": 0.021})
    assert full_size.main(["--small", "--out", str(tmp_path)]) == 1


def test_without_room_for_packed_weights_they_are_left_out(tmp_path, monkeypatch, capsys):
    memory = SimpleNamespace(available=0)
    monkeypatch.setattr(full_size.psutil, "virtual_memory", lambda: memory)
    arguments = ["--small", "--repeats", "1", "--dtype", "fp32", "--out", str(tmp_path)]
    assert full_size.main(arguments) == 2
    assert "GB are free; use another --dtype, or --small" in capsys.readouterr().err
    with torch.device("meta"):
        config = json.loads((full_size.SDXL_CONFIGS / "unet" / "config.json").read_text()) | full_size.SMALL
        unet = full_size.UNet2DConditionModel.from_config(config)
    memory.available = 2 * sum(p.numel() * 4 for p in unet.parameters())
    assert full_size.main(arguments) == 0
    assert "packed weights are left out" in capsys.readouterr().err
    (row,) = csv.DictReader((tmp_path / "full_size_small.csv").open())
    assert row["packed_ms"] == row["error_packed"] == "" and float(row["times_faster"]) > 0
