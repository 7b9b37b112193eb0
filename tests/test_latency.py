"""benchmarks.latency on a tiny model: that it runs, in turn, and writes what it measured."""

import csv

from benchmarks import latency
from benchmarks.measure import interleave, percentiles
from tests import saved_model
from tests.tiny import make_adapter


def test_writes_a_row_for_each_runtime(tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    arguments = [
        "--model",
        str(saved_model.folder()),
        "--adapter",
        str(tmp_path / "adapter"),
        "--out",
        str(tmp_path),
    ]
    latency.main([*arguments, "--steps", "2", "--repeats", "2", "--dtype", "fp32"])
    rows = list(csv.DictReader((tmp_path / "latency.csv").open()))
    assert [row["runtime"] for row in rows] == ["localcontrol", "diffusers", "diffusers channels_last"]
    own = float(rows[0]["p50_ms"])
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert abs(float(row["times_ours"]) - float(row["p50_ms"]) / own) < 0.01
        assert all(row[key] for key in ("device", "torch", "diffusers", "commit", "date"))


def test_runs_take_turns_and_the_first_of_each_does_not_count():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" * 4
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_percentiles_in_milliseconds():
    assert percentiles([i / 1000 for i in range(11)]) == {"p20_ms": 2.0, "p50_ms": 5.0, "p80_ms": 8.0}
    assert percentiles([0.5])["p20_ms"] == 500.0
