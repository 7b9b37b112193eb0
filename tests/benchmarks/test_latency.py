"""benchmarks.latency on a tiny model: that it runs, in turn, and writes what it measured."""

import csv
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import latency
from benchmarks.measure import flops, interleave, percentiles
from runtime import LocalControlPipeline
from runtime.optimize.packed import packs_here
from tests.support import saved_model
from tests.support.tiny import make_adapter


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
    latency.main([*arguments, "--steps", "2", "--repeats", "2", "--dtype", "fp32", "--attention", "math"])
    rows = list(csv.DictReader((tmp_path / "latency.csv").open()))
    names = ["localcontrol", "localcontrol math", "diffusers", "diffusers channels_last"]
    assert [row["runtime"] for row in rows] == names
    own = float(rows[0]["p50_ms"])
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert abs(float(row["times_ours"]) - float(row["p50_ms"]) / own) < 0.01
        assert all(row[key] for key in ("device", "torch", "diffusers", "commit", "date", "first_ms"))
        assert 0 < float(row["peak_share"]) < 1 and float(row["tflops"]) < float(row["peak_tflops"])
    stages = [float(rows[0][f"{stage}_ms"]) for stage in latency.STAGES]
    assert 0.5 * own < sum(stages) < 1.5 * own and abs(float(rows[0]["step_ms"]) - stages[2] / 2) < 0.01
    assert rows[2]["denoise_ms"] == "" and float(rows[1]["denoise_ms"]) > 0
    assert min(Image.open(tmp_path / "latency.png").size) > 100


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the module is there already
def test_the_command_ends_with_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency", "--out", "/dev/null/out"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.latency", run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: out /dev/null/out: ")


def with_engines(monkeypatch, **precisions):
    """Have folders be engines, and their pipelines the folders' names; return what there was to measure."""
    found = {folder: SimpleNamespace(target="openvino", precision=p) for folder, p in precisions.items()}
    monkeypatch.setattr(latency, "read_manifest", found.__getitem__)
    monkeypatch.setattr(latency.LocalControlPipeline, "from_engine", lambda folder: folder)
    measured = []
    monkeypatch.setattr(latency, "measure", lambda ours, *_: measured.append(list(ours)) or [{"a": 1}])
    for module, name in ((latency, "matmul_rate"), (latency.latency_plot, "draw")):
        monkeypatch.setattr(module, name, lambda *_: None)
    return measured


def test_two_engines_of_one_target_have_a_row_each(tmp_path, monkeypatch):
    measured = with_engines(monkeypatch, one="fp32", two="fp32")
    arguments = ["--dtype", "fp32", "--engine", "one", "two", "--out", str(tmp_path)]
    assert latency.main(arguments) == 0
    assert measured == [["localcontrol", "localcontrol openvino", "localcontrol openvino, two"]]


def test_an_engine_of_a_precision_that_is_not_compared_is_said(tmp_path, monkeypatch, capsys):
    measured = with_engines(monkeypatch, one="fp32", two="bf16")
    assert latency.main(["--dtype", "fp32", "--engine", "one", "two", "--out", str(tmp_path)]) == 0
    assert measured == [["localcontrol", "localcontrol openvino"]]
    assert (
        "warning: engine two: left out, it is in bf16, which --dtype does not name" in capsys.readouterr().err
    )


def test_runs_take_turns_and_the_first_of_each_does_not_count():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" * 4
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_percentiles_in_milliseconds():
    assert percentiles([i / 1000 for i in range(11)]) == {"p20_ms": 2.0, "p50_ms": 5.0, "p80_ms": 8.0}
    assert percentiles([0.5])["p20_ms"] == 500.0


def test_arithmetic_of_products_convolutions_and_attention():
    a, q = torch.randn(8, 16), torch.randn(1, 2, 32, 4)
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert flops(lambda: a @ a.T) == 2 * 8 * 8 * 16
    assert flops(lambda: conv(torch.randn(1, 3, 10, 10))) == 2 * 100 * 5 * 27
    attention = flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention == 2 * (2 * 2 * 32 * 32 * 4)


@pytest.mark.skipif(not packs_here(torch.bfloat16, torch.device("cpu")), reason="no bfloat16 arithmetic")
def test_packed_weights_do_as_much():
    call = {"prompt": "a star", "steps": 1, "seed": 0}
    pipes = [LocalControlPipeline.from_pretrained("embedded", dtype=dtype) for dtype in ("fp32", "bf16")]
    plain, packed = (flops(lambda pipe=pipe: pipe(**call)) for pipe in pipes)
    assert plain == packed > 1e9


def test_no_stages_where_a_pipeline_does_not_tell():
    assert set(latency.stage_medians([], 30).values()) == {""}
    found = latency.stage_medians(
        [dict.fromkeys(latency.STAGES, 0.03), dict.fromkeys(latency.STAGES, 0.03)], 30
    )
    assert found["denoise_ms"] == 30 and found["step_ms"] == pytest.approx(1)
