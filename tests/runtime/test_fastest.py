"""runtime.fastest: what was measured is remembered for these files on this machine, and decides for the whole wait."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from runtime import Region, fastest, generate
from runtime.engines.manifest import read_manifest
from runtime.errors import InputError
from runtime.sampling.request import Request
from tests.support import engines, saved_model


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
    assert fastest.expect(times, Request("", steps=fastest.STEPS)) == 500
    assert fastest.expect(times, Request("", steps=3 * fastest.STEPS)) == 700
    assert fastest.expect(times, Request("", steps=fastest.STEPS, images_per_prompt=4, height=128)) == 1200
    assert fastest.expect(times, Request("", steps=fastest.STEPS, guidance=1)) == 450


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
    found = fastest.choose(*what, "fp32", Request("x", steps=30))
    assert found == (str(folder), 470.0, 500.0)
    assert fastest.choose(*what, "fp32", Request("x", steps=10)) is None  # PyTorch is there first


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16"},
        {"adapters": {}},
        {"model": "embedded"},
    ],
    ids=str,
)
def test_not_for_anything_else(measured, change):
    _, model, adapters = measured
    what = {"model": model, "adapters": adapters, "dtype": "fp32", "request": Request("x", steps=30)}
    assert fastest.choose(**what) is not None
    assert fastest.choose(**(what | change)) is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"height": 4096}, "height 4096: the engines were built for"),
        ({"images_per_prompt": 32}, r"rows of the UNet .* 64: the engines were built for"),
        ({"regions": [Region(torch.ones(8, 8), adapter="depth")]}, "adapter 'depth' is unknown"),
    ],
    ids=["size", "rows", "adapter"],
)
def test_an_engine_that_does_not_take_the_request_is_left_out_with_a_word(measured, asked, reason):
    folder, *what = measured
    with pytest.warns(UserWarning, match=f"engine {folder}: .*{reason}.*; it is left out"):
        assert fastest.choose(*what, "fp32", Request("x", **asked)) is None


def test_an_engine_whose_files_have_changed_is_left_out_with_a_word(measured, cache, tmp_path):
    _, *what = measured
    copy = engines.copy_folder("onnxruntime", tmp_path / "engine")
    table = json.loads((cache / "fastest.json").read_text())
    table[0] |= {"engine": str(copy)}
    (cache / "fastest.json").write_text(json.dumps(table))
    assert fastest.choose(*what, "fp32", Request("x"))[0] == str(copy)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.warns(UserWarning, match="rebuilt since it was measured"):
        assert fastest.choose(*what, "fp32", Request("x")) is None
    manifest.unlink()
    with pytest.warns(UserWarning, match=r"its manifest.json cannot be read: No such file"):
        assert fastest.choose(*what, "fp32", Request("x")) is None


BROKEN = {
    "empty": "",
    "cut": "{",
    "no list": "{}",
    "numbers": "[1]",
    "other fields": '[{"engine": 1}]',
    "deep": "[" * 100_000,
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_table_is_refused_in_one_line(cache, case):
    cache.mkdir()
    text = BROKEN[case]
    (cache / "fastest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        InputError, match=r"fastest.json: not a table of measurements.*; remove it, or run"
    ) as caught:
        fastest.choose("embedded", {}, "fp32", Request("x"))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [0, -1, 1e400, 10**400, "1", None, True, [1]], ids=repr)
@pytest.mark.parametrize("field", fastest.TIMES)
def test_a_time_that_is_not_one_makes_the_table_a_damaged_one(measured, cache, field, value):
    _, *what = measured
    table = json.loads((cache / "fastest.json").read_text())
    table[0]["times"][field] = value
    (cache / "fastest.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="not a table of measurements"):
        fastest.choose(*what, "fp32", Request("x"))


@pytest.fixture
def command(measured, tmp_path, monkeypatch):
    """Run the command line for the measured model; returns its exit code."""
    _, model, adapters = measured
    monkeypatch.setattr(fastest, "STEPS", 1)  # so that a few steps are many
    base = ["--prompt", "a star", "--model", model, "--adapter", f"canny={adapters['canny']}", "--steps", "4"]
    base += ["--seed", "1", "--out", str(tmp_path / "a.png"), "--report", str(tmp_path / "a.json")]
    return lambda *options: generate.main([*base, *options])


def drawn_by(tmp_path) -> str | None:
    return json.loads((tmp_path / "a.json").read_text())["settings"]["engine"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


HARMS = {
    "gone": lambda folder, _: shutil.rmtree(folder),
    "truncated": lambda folder, _: cut(next(folder.rglob("unet*.onnx.data"))),
    "no manifest": lambda folder, _: (folder / "manifest.json").unlink(),
    "a cut manifest": lambda folder, _: cut(folder / "manifest.json"),
    "a name that no file has": lambda folder, table: table.write_text(
        table.read_text().replace(json.dumps(str(folder)), json.dumps("engine\0"))
    ),
    "a number that no float is": lambda _, table: table.write_text(
        re.sub(r'"pixels": \d+', f'"pixels": 1{"0" * 400}', table.read_text())
    ),
    "a deep table": lambda _, table: table.write_text("[" * 100_000),
    "no pixels": lambda _, table: table.write_text(
        re.sub(r'"pixels": \d+', '"pixels": 0', table.read_text())
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_whatever_is_wrong_with_an_engine_pytorch_draws(command, cache, tmp_path, capsys, harm):
    copy = engines.copy_folder("onnxruntime", tmp_path / "engine")
    table = cache / "fastest.json"
    entries = json.loads(table.read_text())
    entries[0] |= {"engine": str(copy), "manifest": fastest.manifest_digest(str(copy))}
    table.write_text(json.dumps(entries))
    assert command() == 0
    assert drawn_by(tmp_path) == str(copy)
    HARMS[harm](copy, table)
    capsys.readouterr()
    assert command() == 0
    assert drawn_by(tmp_path) is None
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and len(warned[0]) < 1000, warned


def test_an_engine_built_with_guidance_is_not_taken_for_steps_without(
    measured, command, tmp_path, capsys, monkeypatch
):
    def always(path):
        manifest = read_manifest(path)
        return replace(manifest, profile=replace(manifest.profile, guidance="always"))

    monkeypatch.setattr(fastest, "read_manifest", always)
    assert command() == 0 and drawn_by(tmp_path) is not None
    capsys.readouterr()
    assert command("--guidance-range", "0", "0.6") == 0 and drawn_by(tmp_path) is None
    assert "warning: engine" in capsys.readouterr().err


def test_a_cache_of_nobody_is_a_warning(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCALCONTROL_CACHE", "~nosuchuser/x")
    assert command() == 0 and drawn_by(tmp_path) is None
    assert "warning: LOCALCONTROL_CACHE ~nosuchuser/x: " in capsys.readouterr().err
    assert fastest.main(["--engine", "nowhere"]) == 2


def test_measuring_again_replaces(measured):
    folder, model, adapters = measured
    command = ["--engine", str(folder), "--model", model, "--adapter", f"canny={adapters['canny']}"]
    assert fastest.main([*command, "--dtype", "fp32"]) == 0
    assert len(fastest.read_table()) == 1


def test_a_table_that_cannot_be_written_loses_no_time_that_was_measured(measured, cache, capsys):
    folder, model, adapters = measured
    (cache / fastest.TABLE).unlink()
    (cache / fastest.TABLE).mkdir()
    command = ["--engine", str(folder), "--model", model, "--adapter", f"canny={adapters['canny']}"]
    assert fastest.main([*command, "--dtype", "fp32"]) == 2
    said = capsys.readouterr().err
    assert "10.0 ms a picture" in said and "100.0 ms a picture" in said and "cannot write" in said


def test_two_that_measure_at_once_lose_nothing(measured, monkeypatch):
    (known,) = fastest.read_table()
    right = fastest.read_table

    def slow():
        found = right()
        time.sleep(0.05)
        return found

    monkeypatch.setattr(fastest, "read_table", slow)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: fastest.remember([{**known, "engine": f"engine {i}"}]), range(8)))
    assert {entry["engine"] for entry in right()} == {known["engine"], *(f"engine {i}" for i in range(8))}


@pytest.mark.parametrize(
    ("prompt", "syntax"),
    [("a red car, " * 30, "plain"), ("猫" * 100, "plain"), ("7" * 80, "plain"), ("a BREAK b", "a1111")],
)
def test_a_prompt_that_is_longer_than_an_engines_is_left_to_pytorch(measured, prompt, syntax):
    folder, *what = measured
    request = Request(prompt, steps=30, prompt_syntax=syntax)
    assert fastest.choose(*what, "fp32", request) is None
    short = Request(
        "a red star and a blue circle on sand, a green ring at night, and a purple square", steps=30
    )
    assert fastest.choose(*what, "fp32", short)[0] == str(folder)


@pytest.mark.parametrize(
    "harm", [shutil.rmtree, lambda folder: cut(folder / "tokenizer.json")], ids=["gone", "cut"]
)
def test_a_long_prompt_needs_no_tokenizer_of_an_engine(measured, cache, tmp_path, harm):
    _, *what = measured
    copy = engines.copy_folder("onnxruntime", tmp_path / "engine")
    (entry,) = fastest.read_table()
    (cache / fastest.TABLE).write_text(json.dumps([entry | {"engine": str(copy)}]))
    harm(copy / "model" / "tokenizer")
    with pytest.warns(UserWarning, match=f"engine {copy}: its tokenizer cannot be read: .*; it is left out"):
        assert fastest.choose(*what, "fp32", Request("a red star and " * 8, steps=30)) is None


def test_a_cache_that_cannot_be_locked_is_one_line(measured, cache):
    (cache / ".lock").unlink(missing_ok=True)
    (cache / ".lock").mkdir()
    with pytest.raises(InputError, match="table: cannot write"):
        fastest.remember(fastest.read_table())


def test_the_command_line_takes_it_unless_an_option_needs_pytorch(measured, command, tmp_path, capsys):
    folder = measured[0]
    assert command() == 0
    assert f"backend  {folder}: 0.5 s expected, 0.6 s in PyTorch" in capsys.readouterr().err
    assert drawn_by(tmp_path) == str(folder)
    for option in (
        ["--backend", "torch"],
        ["--device", "cpu"],
        ["--cache-interval", "2"],
        ["--attention", "math"],
    ):
        assert command(*option) == 0
        assert "backend" not in capsys.readouterr().err


def test_engines_of_another_precision_are_bad_input(cache, capsys):
    assert fastest.main(["--engine", str(engines.folder("onnxruntime")), "--dtype", "bf16"]) == 2
    assert "it computes in fp32, expected bf16; see --dtype" in capsys.readouterr().err


@pytest.mark.parametrize("again", [[], ["--engine"]], ids=["one option", "two"])
def test_several_engines(again, cache, capsys):
    folder = str(engines.folder("onnxruntime"))
    assert fastest.main(["--engine", folder, *again, "nowhere", "--dtype", "fp32"]) == 2
    assert "engine nowhere: no manifest.json in it" in capsys.readouterr().err


def test_a_part_that_is_a_link_is_looked_at(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unet").symlink_to(tmp_path / "shared", target_is_directory=True)
    before = fastest.fingerprint(tmp_path / "model")
    (tmp_path / "shared" / "config.json").write_text('{"sample_size": 32}')
    assert fastest.fingerprint(tmp_path / "model") != before
