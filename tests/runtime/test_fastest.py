"""runtime.fastest: what was measured is remembered for these files on this machine, and decides for the whole wait."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from runtime import fastest, generate
from runtime.errors import InputError
from tests.support import engines, saved_model

SIZES = {"rows": 2}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALCONTROL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pipe(seconds: float, value: float = 1.0):
    """Stands in for a pipeline that takes so long to load, and for a picture."""

    def load():
        time.sleep(2 * seconds)
        return stand_in

    def call(*_, **__):
        time.sleep(seconds)
        return SimpleNamespace(latents=torch.full((1, 4, 8, 8), value))

    class Pipe:
        default_size, adapters = 64, {}
        __call__ = staticmethod(call)

    stand_in = Pipe()
    return load


def test_times_of_a_picture_and_of_the_first_one():
    found = fastest.measure({"torch": pipe(0.02), "engine": pipe(0.06, 1.0005)}, limit=1e-3)
    assert 20 <= found["torch"]["picture_ms"] < 40 <= 60 <= found["engine"]["picture_ms"] < 90
    assert 60 <= found["torch"]["first_ms"] < 120 <= 180 <= found["engine"]["first_ms"] < 240
    assert found["torch"]["pixels"] == 64 * 64


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_an_engine_that_draws_something_else_is_refused(value):
    with pytest.raises(InputError, match="engine other: its picture is another than PyTorch's"):
        fastest.measure({"torch": pipe(0), "other": pipe(0, value)}, limit=1e-3)


def test_the_wait_grows_with_steps_pictures_and_pixels():
    times = {"first_ms": 500.0, "picture_ms": 100.0, "pixels": 64 * 64}
    assert fastest.expect(times, {"rows": 2}, fastest.STEPS) == 500
    assert fastest.expect(times, {"rows": 2}, 3 * fastest.STEPS) == 700
    assert fastest.expect(times, {"rows": 8, "height": 128}, fastest.STEPS) == 1200
    assert fastest.expect(times, {"rows": 1}, fastest.STEPS) == 450


@pytest.fixture
def measured(cache, monkeypatch, capsys):
    """The tiny model's table with an engine that is quicker at a picture, slower at the first."""
    folder = engines.folder("onnxruntime")
    times = {
        "torch": {"picture_ms": 100.0, "first_ms": 300.0, "pixels": 64 * 64},
        str(folder): {"picture_ms": 10.0, "first_ms": 450.0, "pixels": 64 * 64},
    }
    monkeypatch.setattr(fastest, "measure", lambda loads, limit: {name: times[name] for name in loads})
    model, adapter = saved_model.folder(), engines.adapter()
    command = ["--engine", str(folder), "--model", str(model), "--adapter", f"canny={adapter}"]
    assert fastest.main([*command, "--dtype", "fp32"]) == 0
    assert f"saved {cache / 'fastest.json'}" in capsys.readouterr().err
    return folder, str(model), {"canny": str(adapter)}


def test_the_engine_is_taken_where_the_picture_comes_sooner(measured):
    folder, *what = measured
    found = fastest.choose(*what, "fp32", SIZES, 30)
    assert found == (str(folder), 470.0, 500.0)
    assert fastest.choose(*what, "fp32", SIZES, 10) is None  # PyTorch is there first


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16"},
        {"adapters": {}},
        {"model": "embedded"},
        {"sizes": {"rows": 2, "height": 4096}},
        {"sizes": {"rows": 64}},
    ],
    ids=str,
)
def test_not_for_anything_else(measured, change):
    _, model, adapters = measured
    what = {"model": model, "adapters": adapters, "dtype": "fp32", "sizes": SIZES, "steps": 30}
    assert fastest.choose(**what) is not None
    assert fastest.choose(**(what | change)) is None


def test_not_where_a_file_has_changed(measured, tmp_path):
    _, model, adapters = measured
    copy = engines.copy_folder("onnxruntime", tmp_path / "engine")
    table = json.loads(fastest.table_path().read_text())
    table[0] |= fastest.identity(model, adapters, "fp32", str(copy))
    fastest.table_path().write_text(json.dumps(table))
    assert fastest.choose(model, adapters, "fp32", SIZES, 30)[0] == str(copy)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert fastest.choose(model, adapters, "fp32", SIZES, 30) is None
    manifest.unlink()
    assert fastest.choose(model, adapters, "fp32", SIZES, 30) is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"engine": 1}]', '[{"engine": "x", "times": 3}]'])
def test_a_damaged_table_is_no_table(cache, text):
    cache.mkdir()
    (cache / "fastest.json").write_text(text)
    assert fastest.choose("embedded", {}, "fp32", SIZES, 30) is None


def test_measuring_again_replaces(measured):
    folder, model, adapters = measured
    command = ["--engine", str(folder), "--model", model, "--adapter", f"canny={adapters['canny']}"]
    assert fastest.main([*command, "--dtype", "fp32"]) == 0
    assert len(fastest.read_table()) == 1


def test_the_command_line_takes_it_unless_an_option_needs_pytorch(measured, tmp_path, monkeypatch, capsys):
    folder, model, adapters = measured
    monkeypatch.setattr(fastest, "STEPS", 1)  # so that a few steps are many
    base = ["--prompt", "a star", "--model", model, "--adapter", f"canny={adapters['canny']}", "--steps", "4"]
    base += ["--seed", "1", "--out", str(tmp_path / "a.png"), "--report", str(tmp_path / "a.json")]
    assert generate.main(base) == 0
    assert f"backend  {folder}: 0.5 s expected, 0.6 s in PyTorch" in capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["engine"] == str(folder)
    for option in (
        ["--backend", "torch"],
        ["--device", "cpu"],
        ["--cache-interval", "2"],
        ["--attention", "math"],
    ):
        assert generate.main([*base, *option]) == 0
        assert "backend" not in capsys.readouterr().err


def test_engines_of_another_precision_are_bad_input(cache, capsys):
    assert fastest.main(["--engine", str(engines.folder("onnxruntime")), "--dtype", "bf16"]) == 2
    assert "it computes in fp32, expected bf16; see --dtype" in capsys.readouterr().err


@pytest.mark.parametrize("again", [[], ["--engine"]], ids=["one option", "two"])
def test_several_engines(again, cache, capsys):
    folder = str(engines.folder("onnxruntime"))
    assert fastest.main(["--engine", folder, *again, "nowhere", "--dtype", "fp32"]) == 2
    assert "engine nowhere: no manifest.json in it" in capsys.readouterr().err
