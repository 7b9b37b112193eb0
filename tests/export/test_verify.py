"""export.verify: passes what is right, fails what is not, and says what it could not compare."""

import json
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from export import build_engine, verify
from runtime import LocalControlPipeline
from runtime.engines import verified
from runtime.engines.manifest import file_entry
from runtime.errors import InputError
from tests.support import cpus, engines, saved_model


@pytest.fixture(scope="module", params=engines.TARGETS)
def table(request) -> list[verify.Row]:
    return list(verify.verify(engines.folder(request.param), say=lambda line: None))


def test_every_graph_size_and_output_is_within_its_limit(table):
    assert {row.graph for row in table} == set(engines.ENGINES)
    assert all(row.passed for row in table), [verify.format_row(row) for row in table if not row.passed]
    assert max(row.rms for row in table) < 1e-5
    assert len({row.sizes for row in table if row.graph == "unet"}) == 3


def test_timesteps_masks_strengths_and_no_control_are_tried(table):
    tried = {row.inputs for row in table}
    assert {"timestep 999", "timestep 500", "timestep 1", "no control", "soft masks", "hard masks"} <= tried


def test_openvino_is_compared_and_so_is_its_onnx_file():
    rows = verify.verify(engines.folder("openvino"), only=("vae_decoder",), smallest=True)
    assert [row.against for row in rows] == ["onnxruntime", "openvino"]


def test_command_line_prints_a_table_and_writes_json(tmp_path, capsys):
    arguments = [
        str(engines.folder("onnxruntime")),
        "--graphs",
        "vae_decoder",
        "--json",
        str(tmp_path / "t.json"),
    ]
    assert verify.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "3 of 3 within tolerance"
    assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == 3


def test_a_wrong_weight_in_the_graph_fails(tmp_path, capsys):
    """One weight changed in the ONNX file, its hash in the manifest changed with it: only running it can tell."""
    folder = engines.copy_folder("onnxruntime", tmp_path)
    path = folder / "onnx" / "vae_decoder.onnx"
    model = onnx.load(path)
    weight = next(x for x in model.graph.initializer if x.name.endswith("conv_out.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    data = path.with_name(f"{path.name}.data")
    data.unlink()
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=256)
    entries = {str(file.relative_to(folder)): file_entry(file) for file in (path, data)}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] |= entries
    saved_model.edit_json(folder / "manifest.json", files=manifest["files"])
    assert verify.main([str(folder), "--graphs", "vae_decoder"]) == 1
    assert "FAIL vae_decoder" in capsys.readouterr().out
    assert verify.main([str(folder), "--graphs", "vae_decoder", "--tolerance", "0.1"]) == 0


BAD = {
    "no folder": ["nowhere"],
    "no such graph": ["{folder}", "--graphs", "unett"],
    "another model": ["{folder}", "--model", "embedded"],
    "no such model": ["{folder}", "--model", "nowhere"],
    "unwritable table": ["{folder}", "--graphs", "vae_decoder", "--json", "nowhere/t.json"],
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, capsys):
    folder = engines.folder("onnxruntime")
    assert verify.main([argument.format(folder=folder) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert lines[-1].startswith("error: ")


def test_a_damaged_engine_does_not_pass(tmp_path, capsys):
    folder = engines.copy_folder("openvino", tmp_path)
    path = folder / "engines" / "vae_decoder.bin"
    path.write_bytes(b"edit" + path.read_bytes()[4:])
    assert verify.main([str(folder), "--graphs", "vae_decoder"]) == 2
    assert "vae_decoder.bin was edited" in capsys.readouterr().err


def entries(folder):
    return [(entry["passed"], entry["worst"]) for entry in verified.entries(folder)]


def test_the_outcome_is_noted_in_the_folder(tmp_path):
    folder = engines.copy_folder("onnxruntime", tmp_path)
    (folder / verified.FILE).unlink()
    assert verify.main([str(folder), "--smallest", "--graphs", "vae_decoder"]) == 0
    assert entries(folder) == []  # the other graphs were not compared
    assert verify.main([str(folder), "--smallest", "--tolerance", "1"]) == 0
    assert entries(folder) == []  # by a tolerance of one's own
    assert verify.main([str(folder), "--smallest"]) == 0
    ((passed, worst),) = entries(folder)
    assert passed and "at most 1e-04" in worst


def test_a_failure_is_noted_and_the_folder_is_not_opened_any_more(tmp_path, monkeypatch):
    folder = engines.copy_folder("onnxruntime", tmp_path)
    monkeypatch.setitem(verify.TOLERANCES, torch.float32, 1e-12)
    assert verify.main([str(folder), "--smallest", "--graphs", "vae_decoder"]) == 1
    ((passed, worst),) = entries(folder)
    assert not passed and worst.startswith("vae_decoder pixels")
    with pytest.raises(InputError, match="computes something else than torch"):
        LocalControlPipeline.from_engine(folder)


def test_a_failure_at_a_larger_size_is_not_taken_back_at_the_smallest(tmp_path, monkeypatch):
    folder = engines.copy_folder("onnxruntime", tmp_path, ("text_encoder",))
    monkeypatch.setitem(verify.TOLERANCES, torch.float32, 1e-12)
    assert verify.main([str(folder)]) == 1
    monkeypatch.undo()
    assert verify.main([str(folder), "--smallest"]) == 0
    assert [passed for passed, _ in entries(folder)] == [False]
    assert verify.main([str(folder)]) == 0
    assert [passed for passed, _ in entries(folder)] == [True]


def test_a_folder_that_cannot_be_written_is_compared_all_the_same(tmp_path, monkeypatch, capsys):
    folder = engines.copy_folder("onnxruntime", tmp_path)

    def refuse(*_):
        raise InputError("verified.json: cannot write it")

    monkeypatch.setattr(verified, "write_json", refuse)
    assert verify.main([str(folder), "--smallest"]) == 0
    assert "not noted: verified.json: cannot write it" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1e-4, 1e-12], ids=["right", "wrong"])
def test_a_build_compares_what_it_built(tmp_path, monkeypatch, capsys, limit):
    monkeypatch.setitem(verify.TOLERANCES, torch.float32, limit)
    arguments = ["--model", str(saved_model.folder()), "--precision", "fp32", "--batch=1:1:2"]
    arguments += ["--components=text_encoder", "--height=32:64:96", "--width=32:64:96"]
    code = build_engine.main([*arguments, "--target=onnxruntime", "--out", str(tmp_path / "engines")])
    ((passed, worst),) = entries(tmp_path / "engines")
    err = capsys.readouterr().err
    assert "compare with torch" in err and "text_encoder states" in worst
    assert (code, passed, "FAIL text_encoder" in err) == (
        (0, True, False) if limit == 1e-4 else (1, False, True)
    )


def test_the_truth_is_computed_in_float32_where_the_cpu_is_slow_in_the_engines_type(monkeypatch):
    """Otherwise it would not end: seconds for the embedded model, hours for SDXL."""
    used = []
    run = verify._run_torch
    monkeypatch.setattr(
        verify,
        "_run_torch",
        lambda module, *rest: used.append(next(module.parameters()).dtype) or run(module, *rest),
    )
    folder = half_precision_folder()
    for kind in cpus.KINDS[:2]:
        with pytest.MonkeyPatch.context() as patch:
            cpus.pretend(kind, patch)
            assert all(row.passed for row in verify.verify(folder, smallest=True, engines_only=True))
    assert set(used) == {torch.float32}


@cache
def half_precision_folder():
    path = Path(engines._DIRECTORY.name) / "half"
    arguments = ["--model", str(saved_model.folder()), "--precision", "fp16", "--components=text_encoder_2"]
    return engines.build(
        path, "--target", "onnxruntime", *arguments, *engines.sizes_arguments(engines.PROFILE)
    )
