"""benchmarks.lossy: the lossless row costs nothing, a lossy one something, and all are timed in one run."""

import csv

import pytest
import torch

from benchmarks import lossy
from runtime.machine.arithmetic import is_quick
from runtime.optimize.fp8 import multiplies_here


def test_rows_against_the_lossless_picture(tmp_path, monkeypatch):
    settings = ("lossless", "guidance in steps 0 to 40 %", "10 steps")
    monkeypatch.setattr(lossy, "SETTINGS", {name: lossy.SETTINGS[name] for name in settings})
    monkeypatch.setattr(lossy, "STEPS", 4)
    assert lossy.main(["--count", "2", "--repeats", "2", "--out", str(tmp_path)]) == 0
    rows = {row["setting"]: row for row in csv.DictReader((tmp_path / "lossy.csv").open())}
    cpu = torch.device("cpu")
    rounded = ["bf16", *(["bf16, fp8"] if multiplies_here(cpu) else []), "bf16, fp8-weights"]
    assert list(rows) == [*settings, *(rounded if is_quick(torch.bfloat16, cpu) else [])]
    exact = rows.pop("lossless")
    assert float(exact["times_faster"]) == 1
    assert all(float(exact[f"{name}_mean"]) == 0 for name in ("latents_rms", "lfmse_inside", "lfmse_outside"))
    for row in rows.values():
        assert float(row["latents_rms_mean"]) > 1e-4 and 0 <= float(row["shapes_mean"]) <= 1
        assert (
            float(row["latents_rms_low"]) <= float(row["latents_rms_mean"]) <= float(row["latents_rms_high"])
        )
    if "bf16" in rows:
        assert float(rows["bf16"]["latents_rms_mean"]) < float(rows["10 steps"]["latents_rms_mean"])


def test_a_folder_without_engines_is_bad_input(tmp_path, capsys):
    assert lossy.main(["--count", "1", "--engine", "nowhere", "--out", str(tmp_path)]) == 2
    assert "nowhere: no manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["count", "repeats"])
def test_nothing_to_measure_is_bad_input(name, tmp_path, capsys):
    assert lossy.main([f"--{name}", "0", "--out", str(tmp_path)]) == 2
    assert f"{name} 0: expected 1 or more" in capsys.readouterr().err


def test_a_file_in_the_way_is_found_before_drawing(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert lossy.main(["--out", str(tmp_path / "file")]) == 2
    assert "is not a folder" in capsys.readouterr().err
