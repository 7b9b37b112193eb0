"""runtime.engines.manifest: it comes back equal, and whatever does not match the folder is refused in one line."""

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from runtime.engines.manifest import (
    FORMAT,
    NAME,
    EngineSpec,
    Manifest,
    check_files,
    check_versions,
    file_entry,
    read_manifest,
    write_manifest,
)
from runtime.engines.ports import Axis, Port, Profile
from runtime.errors import InputError
from tests.support import engines
from tests.support.refusals import refusal
from tests.support.saved_model import edit_json

COMMAND = "python -m export.build_engine --target onnxruntime --out 'my engines'"
FILES = {"engines/unet.onnx": b"graph", "engines/unet.onnx.data": bytes(range(256))}
SPEC = EngineSpec(
    files=tuple(FILES),
    inputs=(
        Port("sample", torch.float32, (Axis("rows"), 4, Axis("height", 8), Axis("width", 8))),
        Port("ids", torch.int64, (Axis("items"), 77)),
    ),
    outputs=(Port("prediction", torch.bfloat16, (Axis("rows"), 4, Axis("height", 8), Axis("width", 8))),),
    dtype=torch.float16,
    weights="0123",
    onnx="onnx/unet.onnx",
    layers={"FLOAT16": 120, "FLOAT": 3},
)
MANIFEST = Manifest(
    target="onnxruntime",
    precision="fp16",
    profile=Profile((1, 1, 4), (512, 768, 1024), (640, 640, 640), "always"),
    engines={"unet": SPEC, "adapter_canny": replace(SPEC, onnx=None, layers={})},
    model={"source": "sdxl", "vae": None, "loras": [["a.safetensors", 0.5]], "weights": {"unet": "0123"}},
    adapters={"canny": "t2i-adapter"},
    compute_capabilities=("8.9", "12.0"),
    gpu=None,
    refit=True,
    versions={"onnxruntime": "1.20.1", "torch": "2.13.0+cpu"},
    files={},
    stages={"export unet": {"seconds": 1.5, "bytes": 261}},
    command=COMMAND,
    date="2026-11-23",
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """An engine folder with its manifest."""
    for name, content in FILES.items():
        path = tmp_path / "engines" / Path(name).name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    write_manifest(replace(MANIFEST, files={name: file_entry(tmp_path / name) for name in FILES}), tmp_path)
    return tmp_path


def test_it_comes_back_equal(folder):
    found = read_manifest(folder)
    assert found == replace(MANIFEST, files=found.files)
    assert set(found.files) == set(FILES)
    assert found == read_manifest(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["engines", NAME]


def test_it_is_json_that_says_its_format(folder):
    data = json.loads((folder / NAME).read_text())
    assert data["format"] == FORMAT
    assert data["engines"]["unet"]["inputs"][0] == {
        "name": "sample",
        "dtype": "float32",
        "shape": ["rows", 4, "height/8", "width/8"],
    }


def test_a_file_entry(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert file_entry(tmp_path / "a") == {
        "bytes": 3000,
        "sha256": hashlib.sha256(b"abc" * 1000).hexdigest(),
    }


def test_a_new_one_takes_the_place_of_the_old(folder):
    write_manifest(replace(MANIFEST, date="2027-01-01"), folder)
    assert read_manifest(folder).date == "2027-01-01"


def test_a_folder_that_cannot_be_written(tmp_path):
    assert refusal(write_manifest, MANIFEST, tmp_path / "no").startswith("manifest: cannot write ")


@pytest.mark.parametrize("where", ["no such folder", "empty folder", "a file"])
def test_no_manifest(tmp_path, where):
    path = tmp_path / "engines"
    if where == "empty folder":
        path.mkdir()
    elif where == "a file":
        path.write_text("{}")
    message = refusal(read_manifest, path)
    assert message.startswith(f"engine {path}: no {NAME} in it; expected a folder")
    assert "python -m export.build_engine" in message


@pytest.mark.parametrize("name", [field.name for field in fields(Manifest)])
def test_a_missing_field_is_named(folder, name):
    drop(folder, name)
    message = refusal(read_manifest, folder)
    assert message == f"{folder / NAME}: {name} is missing; expected an unedited manifest"


@pytest.mark.parametrize("name", [field.name for field in fields(EngineSpec)])
def test_a_missing_field_of_an_engine_is_named(folder, name):
    drop(folder, "engines", "unet", name)
    assert refusal(read_manifest, folder).startswith(f"{folder / NAME}: {name} is missing")


@pytest.mark.parametrize("name", ["name", "dtype", "shape"])
def test_a_missing_field_of_an_input_is_named(folder, name):
    drop(folder, "engines", "unet", "inputs", 0, name)
    assert refusal(read_manifest, folder).startswith(f"{folder / NAME}: {name} is missing")


@pytest.mark.parametrize("name", ["images", "height", "width"])
def test_a_missing_range_is_named(folder, name):
    drop(folder, "profile", name)
    message = refusal(read_manifest, folder)
    assert message.startswith(f"{folder / NAME}: ")
    assert name in message


def drop(folder: Path, *keys: str | int) -> None:
    """Take one value out of the manifest."""
    data = json.loads((folder / NAME).read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    (folder / NAME).write_text(json.dumps(data))


@pytest.mark.parametrize("number", [FORMAT + 1, FORMAT - 1, "1", None])
def test_another_format(folder, number):
    edit_json(folder / NAME, format=number)
    message = refusal(read_manifest, folder)
    assert message.startswith(f"{folder / NAME}: format {number!r}, this version reads {FORMAT}; rebuild")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ('{"format": 1, "target"', "not a JSON file"),
        ("engines", "not a JSON file"),
        ("[]", "expected a JSON object, got a list"),
        ("1", "expected a JSON object, got a int"),
        ("{}", "format None"),
    ],
    ids=["empty", "cut short", "text", "a list", "a number", "an empty object"],
)
def test_what_is_no_manifest(folder, text, message):
    (folder / NAME).write_text(text)
    assert refusal(read_manifest, folder).startswith(f"{folder / NAME}: {message}")


def test_bytes_that_are_no_text(folder):
    (folder / NAME).write_bytes(b"\xff\xfe\x00\x81")
    assert refusal(read_manifest, folder).startswith(f"{folder / NAME}: not a JSON file")


WRONG = {
    "target": 3,
    "precision": ["fp16"],
    "profile": ["both"],
    "engines": ["unet"],
    "model": "sdxl",
    "adapters": ["canny"],
    "compute_capabilities": 8.9,
    "compute_capabilities as text": "8.9",
    "refit": "false",
    "versions": ["1.20.1"],
    "files": ["engines/unet.onnx"],
    "stages": 7,
    "command": None,
    "date": 2026,
}


@pytest.mark.parametrize("case", WRONG)
def test_a_field_of_another_type(folder, case):
    edit_json(folder / NAME, **{case.split(" ", maxsplit=1)[0]: WRONG[case]})
    assert refusal(read_manifest, folder).startswith(f"{folder / NAME}: not a manifest: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float17"),
        ("dtype", "Tensor"),
        ("dtype", 16),
        ("inputs", None),
        ("inputs", [["sample"]]),
        ("inputs", [{"name": "sample", "dtype": "float32", "shape": ["height/x"]}]),
        ("inputs", [{"name": "sample", "dtype": "float32", "shape": [None]}]),
        ("inputs", [{"name": "sample", "dtype": "float32", "shape": 4}]),
        ("files", 1),
    ],
    ids=str,
)
def test_an_engine_of_another_type(folder, field, value):
    data = json.loads((folder / NAME).read_text())
    data["engines"]["unet"][field] = value
    (folder / NAME).write_text(json.dumps(data))
    assert refusal(read_manifest, folder).startswith(f"{folder / NAME}: not a manifest: ")


@pytest.mark.parametrize("profile", [{"depth": [1, 1, 1]}, {"height": [64, 64]}, {"height": 64}], ids=str)
def test_a_profile_of_another_form(folder, profile):
    data = json.loads((folder / NAME).read_text())
    edit_json(folder / NAME, profile=data["profile"] | profile)
    assert refusal(read_manifest, folder).startswith(f"{folder / NAME}: not a manifest: ")


def test_whole_files(folder):
    check_files(read_manifest(folder), folder, list(FILES))
    check_files(read_manifest(folder), folder, [])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("edited", "was edited: its sha256 differs"),
        ("truncated", "has 255 bytes, the manifest says 256"),
        ("longer", "has 257 bytes, the manifest says 256"),
        ("missing", "is missing"),
        ("a folder", "is missing"),
    ],
)
def test_a_file_that_does_not_match(folder, harm, said):
    name = "engines/unet.onnx.data"
    path, content = folder / name, FILES[name]
    path.unlink()
    if harm == "a folder":
        path.mkdir()
    elif harm != "missing":
        changed = {"edited": content[:-1] + b"!", "truncated": content[:-1], "longer": content + b"!"}
        path.write_bytes(changed[harm])
    manifest = read_manifest(folder)
    message = refusal(check_files, manifest, folder, list(FILES))
    assert message.startswith(f"engine {folder}: {name} {said}")
    assert message.endswith(f"; rebuild it: {COMMAND}")
    check_files(manifest, folder, ["engines/unet.onnx"])  # the other one is as it was


def test_a_file_that_the_manifest_does_not_know(folder):
    (folder / "engines" / "new.onnx").write_text("x")
    message = refusal(check_files, read_manifest(folder), folder, ["engines/new.onnx"])
    assert message == f"engine {folder}: files has no engines/new.onnx; rebuild it: {COMMAND}"


@pytest.mark.parametrize(
    ("found", "exact", "expected"),
    [
        ("1.20.1", True, None),
        ("1.20.1", False, None),
        ("1.20.2", False, None),
        ("1.100.0", False, None),
        ("2.0", False, None),
        ("1.20.1+cpu", False, None),
        ("1.20.2", True, "1.20.1"),
        ("1.20", True, "1.20.1"),
        ("1.20.0", True, "1.20.1"),
        ("1.20.0", False, "1.20.1 or later"),
        ("1.9.9", False, "1.20.1 or later"),
        ("0.30", False, "1.20.1 or later"),
    ],
)
def test_versions(found, exact, expected):
    if expected is None:
        check_versions(MANIFEST, {"onnxruntime": found}, exact=exact)
        return
    assert refusal(check_versions, MANIFEST, {"onnxruntime": found}, exact=exact) == (
        f"engine: built with onnxruntime 1.20.1, here is {found}; install {expected}, or rebuild it: {COMMAND}"
    )


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "or later"])
def test_a_version_that_was_not_noted(exact):
    message = refusal(check_versions, MANIFEST, {"openvino": "2026.4"}, exact=exact)
    assert "openvino" in message
    assert message.endswith(COMMAND)
    assert "install None" not in message


@pytest.mark.parametrize(
    ("port", "said"),
    [
        ({"name": ["key_0"], "dtype": "float32", "shape": [1]}, "is called \\['key_0'\\], expected a name"),
        (
            {"name": "shares_1", "dtype": "float32", "shape": [3]},
            "shares_1 is of shape \\(3,\\), expected rows, texts",
        ),
    ],
)
def test_ports_that_no_unet_has_are_message(port, said, tmp_path):
    folder = engines.copy_folder("onnxruntime", tmp_path)
    data = json.loads((folder / NAME).read_text())
    data["engines"]["unet"]["inputs"].append(port)
    (folder / NAME).write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        read_manifest(folder)


def test_a_folder_that_no_file_can_be_in_is_one_line():
    with pytest.raises(InputError, match=r"File name too long|no manifest\.json"):
        read_manifest("x" * 300)
