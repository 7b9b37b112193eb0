"""benchmarks.growth: what grows is what it says, the fit goes through the points, memory is a process's own."""

import csv
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import growth
from runtime import LocalControlPipeline
from runtime.control.masks import box


def test_rows_of_every_axis(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "AXES", {"size": (1, 2), "batch": (1, 2), "regions": (0, 1)})
    monkeypatch.setattr(growth, "in_own_process", lambda options, axis, value: 2**20 * (100 + value))
    assert growth.main(["--steps", "1", "--repeats", "2", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "growth.csv").open()))
    assert [(row["axis"], float(row["work"])) for row in rows] == [
        ("size", 4.096), ("size", 16.384), ("batch", 1), ("batch", 2), ("regions", 0), ("regions", 1)
    ]  # fmt: skip
    for row in rows:  # a line through two points meets both
        assert float(row["fit_ms"]) == pytest.approx(float(row["p50_ms"]), abs=0.02)
    assert rows[1]["peak_memory_mib"] == "102"
    assert min(Image.open(tmp_path / "growth.png").size) > 100


def test_an_engines_rows_name_the_model_that_it_was_built_from(tmp_path, monkeypatch, capsys):
    pipe = LocalControlPipeline.from_pretrained("embedded", dtype="fp32")
    monkeypatch.setattr(growth, "AXES", {"batch": (1,)})
    monkeypatch.setattr(growth, "in_own_process", lambda *_: 2**20)
    monkeypatch.setattr(growth, "plot", lambda *_: None)
    monkeypatch.setattr(growth, "load", lambda options: pipe)
    monkeypatch.setattr(growth, "read_manifest", lambda folder: SimpleNamespace(model={"source": "mine"}))
    arguments = ["--engine", "engines", "--dtype", "bf16", "--steps", "1", "--repeats", "1"]
    assert growth.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "warning: dtype bf16: not used, engine engines has its own" in capsys.readouterr().err
    row = next(csv.DictReader((tmp_path / "growth.csv").open()))
    assert (row["model"], row["engine"], row["dtype"]) == ("mine", "engines", "float32")


@pytest.mark.parametrize("name", ["steps", "repeats"])
def test_nothing_to_measure_is_bad_input(name, tmp_path, capsys):
    assert growth.main([f"--{name}", "0", "--out", str(tmp_path)]) == 2
    assert f"{name} 0: expected 1 or more" in capsys.readouterr().err


def test_regions_differ_and_lie_side_by_side():
    first, second = growth.make_region(64, 0), growth.make_region(64, 1)
    assert not torch.equal(first.condition, second.condition)
    assert torch.equal(first.mask + second.mask, box(64, 64, (0, 0, 16, 64)))


def test_the_peak_is_of_a_process_of_its_own():
    held = torch.ones(2**27)  # 512 MiB here must not count there
    options = growth.argparse.Namespace(engine=None, model="embedded", dtype=None, steps=1)
    peak = growth.in_own_process(options, "batch", 1)
    assert 2**27 < peak < 2**20 * 2000 and held.numel()
