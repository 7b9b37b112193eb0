"""benchmarks.quality.outside: three ways to keep a control local, with the same samples."""

import csv

import numpy as np
import pytest

from benchmarks.quality import outside
from benchmarks.quality.samples import held_out_samples
from runtime import LocalControlPipeline


def test_held_and_pasted_leak_nothing_and_free_does():
    pipe = LocalControlPipeline.from_pretrained("embedded")
    rows = list(outside.draw_all(pipe, held_out_samples(1, ("half",)), "canny", 2))
    assert [row["way"] for row in rows] == ["free", "held", "pasted"]
    assert [row["leakage"] > 0 for row in rows] == [True, False, False]
    assert all(row["seconds"] <= row["seconds_with_reference"] for row in rows)


def test_differences_are_of_the_same_samples():
    rows = [
        {"number": n, "way": way} | dict.fromkeys(outside.FIGURES, n + offset)
        for n in range(4)
        for way, offset in (("free", 0.0), ("held", 1.0), ("pasted", 3.0))
    ]
    found = {(way, name): e for way, name, e in outside.compare(rows)}
    assert found["held", "seam"].mean == 2.5
    difference = found["held - pasted", "seam"]
    assert (difference.mean, difference.low, difference.high) == (-2, -2, -2)


@pytest.mark.slow
def test_the_command_writes_a_table(tmp_path):
    assert outside.main(["--count", "2", "--steps", "2", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "outside.csv").open()))
    assert {row["way"] for row in rows} == {*outside.WAYS, "held - free", "held - pasted"}
    assert np.isfinite([float(row["mean"]) for row in rows if row["figure"] == "seam"]).all()


def test_bad_counts_are_refused(tmp_path, capsys):
    assert outside.main(["--count", "0", "--out", str(tmp_path)]) == 2
    assert "count 0" in capsys.readouterr().err
