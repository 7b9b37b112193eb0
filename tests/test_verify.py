"""export.verify: passes what is right, fails what is not, and says what it could not compare."""

import json

import onnx
import pytest
from onnx import numpy_helper

from export import verify
from runtime.manifest import file_entry
from tests import engines, saved_model


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
