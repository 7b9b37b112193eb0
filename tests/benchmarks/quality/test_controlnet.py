"""benchmarks.quality.controlnet: a ControlNet and an adapter, with the same samples."""

import csv

import pytest

from benchmarks.quality import controlnet
from benchmarks.quality.samples import held_out_samples
from runtime import LocalControlPipeline
from runtime.loading.adapter import EMBEDDED
from runtime.loading.load import load_model
from training.loop.controls import new_controlnet


def test_each_way_is_drawn_of_the_same_sample():
    sources = {"adapter": EMBEDDED / "canny", "controlnet": new_controlnet(load_model("embedded").unet)}
    pipe = LocalControlPipeline.from_pretrained("embedded", sources)
    rows = list(controlnet.draw_all(pipe, held_out_samples(1, ("half",)), 2))
    assert [row["way"] for row in rows] == ["none", "adapter", "controlnet"]
    assert [row["leakage"] > 0 for row in rows] == [False, True, False]  # a new ControlNet adds nothing
    assert rows[2]["lfmse_inside"] == rows[0]["lfmse_inside"] != rows[1]["lfmse_inside"]
    assert all(row["step_seconds"] > 0 for row in rows)


def test_differences_are_of_the_same_samples():
    rows = [
        {"number": n, "way": way} | dict.fromkeys(controlnet.FIGURES, n + offset)
        for n in range(4)
        for way, offset in (("none", 0.0), ("adapter", 1.0), ("controlnet", 3.0))
    ]
    found = {(way, name): e for way, name, e in controlnet.compare(rows)}
    assert found["adapter", "seam"].mean == 2.5
    difference = found["controlnet - adapter", "seam"]
    assert (difference.mean, difference.low, difference.high) == (2, 2, 2)


@pytest.mark.slow
def test_the_command_trains_and_writes_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(controlnet.ablation, "SCENES", 40)
    work = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert controlnet.main(["--count", "1", "--steps", "2", "--training-steps", "1", *work]) == 0
    rows = list(csv.DictReader((tmp_path / "controlnet.csv").open()))
    assert {row["way"] for row in rows} == {*controlnet.WAYS, "controlnet - adapter"}


def test_bad_counts_are_refused(tmp_path, capsys):
    assert controlnet.main(["--count", "0", "--out", str(tmp_path)]) == 2
    assert "count 0" in capsys.readouterr().err
