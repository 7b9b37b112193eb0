"""python -m export.build_engine on the tiny model: what it builds, how it goes on, and every kind of bad input."""

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from export import build as builder
from export import build_engine
from runtime.cli.command import CANCELLED
from runtime.engines import base as engine
from runtime.engines.manifest import MODEL_FILES, NAME, Manifest, read_manifest
from runtime.engines.ports import Profile
from runtime.machine.files import read_json
from tests.support import engines, saved_model
from tests.support.saved_model import edit_tensors
from tests.support.tiny import make_adapter

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("engines")
PART = Path(".engines.part")
PROFILE = Profile((1, 1, 1), (64, 64, 64), (64, 64, 64))
ENCODERS = ("text_encoder", "text_encoder_2")
SHARED = {"dtype": torch.float32, "vae": None, "loras": []}  # how the model that is loaded once is loaded

_DIRECTORY = tempfile.TemporaryDirectory(prefix="localcontrol-builds-")  # removed when the run ends
export_onnx, compile_engine, load_model = builder.export_onnx, builder.compile_engine, builder.load_model


@cache
def graph(name: str) -> Path:
    """A component's ONNX file, exported once a run."""
    path = Path(_DIRECTORY.name) / f"{name}.onnx"
    export_onnx(engines.component(name), PROFILE, path)
    return path


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def made(monkeypatch) -> list[str]:
    """The graphs that were exported and compiled so far, as "export NAME" and "compile NAME".

    The tiny model is loaded, and each of its graphs exported, once a run.
    """
    steps = []

    def export(component, profile, path, progress):
        steps.append(f"export {component.name}")
        assert profile == PROFILE
        for suffix in (".onnx", ".onnx.data"):
            shutil.copy(graph(component.name).with_suffix(suffix), path.with_suffix(suffix))

    def compile_graph(source, *arguments):
        steps.append(f"compile {source.stem}")
        return compile_engine(source, *arguments)

    def load(source, **options):
        shared = source == str(saved_model.folder()) and SHARED.items() <= options.items()
        shared = shared and options["prediction_type"] is None
        return engines.model() if shared else load_model(source, **options)

    saved_model.folder()  # which says how it goes when it is first written
    monkeypatch.setattr(builder, "export_onnx", export)
    monkeypatch.setattr(builder, "compile_engine", compile_graph)
    monkeypatch.setattr(builder, "load_model", load)
    return steps


def arguments(*more: str, target: str = "onnxruntime") -> list[str]:
    base = [
        "--model",
        str(saved_model.folder()),
        "--target",
        target,
        "--precision",
        "fp32",
        "--out",
        "engines",
    ]
    base += ["--components", ",".join(ENCODERS), "--height", "64", "--width", "64", "--no-verify"]
    return [*base, *more]


def run(*more: str, target: str = "onnxruntime") -> int:
    """The exit code of a build of both text encoders; what is given last counts."""
    try:
        return build_engine.main(arguments(*more, target=target))
    except SystemExit as stopped:  # argparse
        return stopped.code


def interrupted(monkeypatch, step: str, name: str, *more: str, target: str = "onnxruntime") -> int:
    """The exit code of a build during which Ctrl-C is pressed at "export_onnx" or "compile_engine" of a graph."""
    call = getattr(builder, step)

    def interrupt(what, *arguments):
        if (what.stem if isinstance(what, Path) else what.name) == name:
            raise KeyboardInterrupt
        return call(what, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(builder, step, interrupt)
        return run(*more, target=target)


def listed(folder: Path = OUT) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def said(capsys) -> list[str]:
    """The lines on stderr; stdout stays empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def assert_whole(folder: Path = OUT) -> Manifest:
    """Fail unless the folder is what its manifest says, and nothing is left beside it."""
    manifest = read_manifest(folder)
    assert listed(folder) == {*manifest.files, NAME}
    engine.check_folder(manifest, folder, torch.device("cpu"))
    assert not [path for path in folder.parent.iterdir() if path.name.endswith((".part", ".old"))]
    return manifest


def onnx_files(*names: str) -> set[str]:
    return {f"onnx/{name}{suffix}" for name in names for suffix in (".onnx", ".onnx.data")}


def test_a_build(monkeypatch, capsys):
    """From the model on: here nothing is replaced."""
    monkeypatch.setattr(builder, "export_onnx", export_onnx)
    monkeypatch.setattr(builder, "load_model", load_model)
    assert run("--components", "text_encoder") == 0
    lines = said(capsys)
    stages = ["load", "about", "export text_encoder", "compile text_encoder", "saved engines"]
    assert len(lines) == len(stages), lines
    assert [line[: len(stage)] for line, stage in zip(lines, stages, strict=True)] == stages
    manifest = assert_whole()
    assert (manifest.target, manifest.precision, manifest.profile) == ("onnxruntime", "fp32", PROFILE)
    assert set(manifest.engines) == {"text_encoder"}
    assert set(manifest.files) >= onnx_files("text_encoder")
    assert manifest.model["weights"] == builder.model_weights(engines.model())
    assert manifest.refit and manifest.compute_capabilities == ()
    assert {"onnxruntime", "torch", "localcontrol"} <= set(manifest.versions)
    assert set(manifest.stages) == {"model", "onnx text_encoder", "engine text_encoder"}
    assert shlex.split(manifest.command)[3:] == [*arguments("--components", "text_encoder"), "--overwrite"]
    opened = engine.open_engine(manifest, OUT, "text_encoder", torch.device("cpu"))
    component = engines.component("text_encoder")
    given = engines.random_inputs(component.inputs, {"items": 1})
    engines.assert_near(opened(given, items=1), engines.run_torch(component, given))


def test_what_the_model_predicts_goes_with_its_engines():
    for given in ([], ["--prediction-type", "v_prediction", "--overwrite"]):
        assert run(*given) == 0
        scheduler = read_json(OUT / MODEL_FILES / "scheduler" / "scheduler_config.json")
        assert scheduler["prediction_type"] == (given[1] if given else "epsilon")


def test_components_are_built_once_each_in_an_order_of_their_own(made):
    assert run("--components", "text_encoder_2,text_encoder,text_encoder_2") == 0
    assert list(assert_whole().engines) == list(ENCODERS)
    assert [step for step in made if step.startswith("export")] == [f"export {name}" for name in ENCODERS]


def test_a_new_parent_folder():
    assert run("--components", "text_encoder", "--out", "new/parent/engines") == 0
    assert_whole(Path("new/parent/engines"))


def test_an_empty_folder_is_taken():
    OUT.mkdir()
    assert run("--components", "text_encoder") == 0
    assert_whole()


def test_the_working_folder_itself(tmp_path):
    assert run("--components", "text_encoder", "--out", ".") == 0
    assert_whole(tmp_path)


def test_an_interrupted_export_goes_on(monkeypatch, made, capsys):
    assert interrupted(monkeypatch, "export_onnx", "text_encoder_2") == CANCELLED == 130
    assert said(capsys)[-1] == "interrupted; the same command with --resume goes on"
    assert not OUT.exists()
    assert made == ["export text_encoder"]
    made.clear()
    assert run("--resume") == 0
    assert made == ["export text_encoder_2", "compile text_encoder", "compile text_encoder_2"]
    manifest = assert_whole()
    assert list(manifest.engines) == list(ENCODERS)
    assert set(manifest.files) >= onnx_files(*ENCODERS)


def test_an_interrupted_compilation_goes_on_without_the_model(monkeypatch, made):
    assert interrupted(monkeypatch, "compile_engine", "text_encoder_2", target="openvino") == 130
    assert not OUT.exists()
    made.clear()
    monkeypatch.setattr(builder, "load", lambda settings: pytest.fail("the model was loaded"))
    assert run("--resume", target="openvino") == 0
    assert made == ["compile text_encoder_2"]
    manifest = assert_whole()
    assert {f"engines/{name}{kind}" for name in ENCODERS for kind in (".xml", ".bin")} <= set(manifest.files)


def test_interrupted_twice(monkeypatch, made):
    assert interrupted(monkeypatch, "export_onnx", "text_encoder") == 130
    assert interrupted(monkeypatch, "compile_engine", "text_encoder", "--resume") == 130
    made.clear()
    assert run("--resume") == 0
    assert made == ["compile text_encoder", "compile text_encoder_2"]
    assert_whole()


def test_a_stopped_build_with_a_unet_goes_on(monkeypatch, made):
    parts = ("--components", "text_encoder,unet")
    for resume in ([], ["--resume"], ["--resume"]):
        assert interrupted(monkeypatch, "export_onnx", "text_encoder", *parts, *resume) == 130


def test_a_graph_that_was_cut_short_is_exported_again(monkeypatch, made):
    assert interrupted(monkeypatch, "export_onnx", "text_encoder_2") == 130
    path = PART / "onnx" / "text_encoder.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    made.clear()
    assert run("--resume") == 0
    assert made[:2] == ["export text_encoder", "export text_encoder_2"]
    assert_whole()


def test_without_resume_all_is_made_again(monkeypatch, made):
    assert interrupted(monkeypatch, "compile_engine", "text_encoder_2") == 130
    made.clear()
    assert run() == 0
    assert len(made) == 4
    assert_whole()


def test_nothing_to_resume(made):
    assert run("--resume") == 0
    assert len(made) == 4
    assert_whole()


def test_other_options_are_not_resumed(monkeypatch, made, capsys):
    assert interrupted(monkeypatch, "export_onnx", "text_encoder_2") == 130
    said(capsys)
    options = [
        "--precision fp16",
        "--width 80",
        "--components text_encoder",
        "--drop-onnx",
        "--batch 2",
        "--refit",
    ]
    for other in options:
        assert run("--resume", *other.split()) == 2, other
        (line,) = said(capsys)
        assert re.fullmatch(r"error: --resume: .*\.engines\.part is of a build with other options; .*", line)
        assert not OUT.exists()
    made.clear()
    assert run("--resume") == 0  # the same command still goes on
    assert "export text_encoder" not in made


def test_a_model_that_has_changed_is_not_resumed(monkeypatch, tmp_path, capsys):
    model = saved_model.copy_folder(tmp_path)
    assert interrupted(monkeypatch, "export_onnx", "text_encoder_2", "--model", str(model)) == 130
    edit_tensors(
        model / "text_encoder_2" / "model.safetensors", lambda tensors: next(iter(tensors.values())).mul_(2)
    )
    said(capsys)
    assert run("--model", str(model), "--resume") == 2
    last = said(capsys)[-1]
    assert last == f"error: --resume: {model} or an adapter has changed since; expected the same weights"
    assert not OUT.exists()


def test_overwrite_replaces(capsys):
    assert run("--components", "text_encoder") == 0
    said(capsys)
    assert run("--components", "text_encoder_2") == 2
    assert said(capsys) == ["error: --out engines: not empty; expected a new folder, or --overwrite"]
    assert list(assert_whole().engines) == ["text_encoder"]
    assert run("--components", "text_encoder_2", "--overwrite") == 0
    assert list(assert_whole().engines) == ["text_encoder_2"]


def test_overwrite_deletes_no_file_of_somebody_else(capsys):
    assert run("--components", "text_encoder") == 0
    (OUT / "verified.json").write_text("{}")  # a comparison's
    (OUT / "engines").mkdir(exist_ok=True)
    notes = OUT / "engines" / "my-notes.txt"
    notes.write_text("mine")
    said(capsys)
    assert run("--components", "text_encoder", "--overwrite") == 2
    assert said(capsys) == [
        "error: --out engines: has engines/my-notes.txt, which is no part of the engines; move it, so that it is not "
        "deleted"
    ]
    assert notes.read_text() == "mine"
    notes.unlink()
    assert run("--components", "text_encoder", "--overwrite") == 0


def test_what_is_to_be_replaced_stays_until_the_new_one_is_whole(monkeypatch):
    assert run("--components", "text_encoder") == 0
    assert interrupted(monkeypatch, "compile_engine", "text_encoder_2", "--overwrite") == 130
    assert list(read_manifest(OUT).engines) == ["text_encoder"]
    engine.check_folder(read_manifest(OUT), OUT, torch.device("cpu"))
    assert run("--resume", "--overwrite") == 0
    assert list(assert_whole().engines) == list(ENCODERS)


def test_without_the_onnx_files():
    assert run("--drop-onnx", target="openvino") == 0
    manifest = assert_whole()
    assert not (OUT / "onnx").exists()
    assert [spec.onnx for spec in manifest.engines.values()] == [None, None]


def test_what_the_engine_itself_needs_is_not_dropped():
    assert run("--drop-onnx", target="onnxruntime") == 0
    manifest = assert_whole()
    assert set(manifest.files) >= onnx_files(*ENCODERS)
    assert manifest.engines["text_encoder"].onnx == "onnx/text_encoder.onnx"


BAD = {
    "unknown target": (["--target", "coreml"], r"argument --target: invalid choice: 'coreml'"),
    "unknown precision": (["--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
    "unknown option": (["--nonsense"], "unrecognized arguments: --nonsense"),
    "a level that is none": (["--level", "6"], "argument --level: invalid choice"),
    "level of another target": (["--level", "3"], "--level: target onnxruntime takes none"),
    "workspace of another target": (["--workspace", "1"], "--workspace: target onnxruntime takes none"),
    "timing cache of another target": (
        ["--timing-cache", "c"],
        "--timing-cache: target onnxruntime takes none",
    ),
    "adapter named as a folder": (
        ["--adapter", "..=nowhere"],
        "--adapter ..: expected a name that a file can have",
    ),
    "batch without end": (["--batch", "99999999999"], "--batch 99999999999: expected at most 1024 images"),
    "unknown guidance": (["--guidance", "some"], "argument --guidance: invalid choice: 'some'"),
    "unknown component": (
        ["--components", "nonsense"],
        "--components nonsense: expected .*text_encoder, .*unet",
    ),
    "one unknown component": (["--components", "unet,vae"], "--components vae: expected"),
    "no component": (["--components", ""], "--components: is empty; expected"),
    "adapters without an adapter": (["--components", "adapter"], "--adapter"),
    "bf16 on ONNX Runtime": (
        ["--precision", "bf16"],
        "--precision bf16: ONNX Runtime .* expected fp32 or fp16",
    ),
    "a GPU for OpenVINO": (
        ["--target", "openvino", "--compute-capability", "8.9"],
        "--compute-capability: target openvino takes none",
    ),
    "height": (["--height", "100"], "height 100: not a multiple of 16; the nearest: 96 and 112"),
    "width of a range": (["--width", "64:72:96"], "width 72: not a multiple of 16"),
    "descending": (["--height", "96:64:32"], "--height 96:64:32: expected .* smallest:usual:largest"),
    "two sizes": (["--width", "64:96"], "--width 64:96: expected"),
    "no size": (["--width", "wide"], "--width wide: expected a whole number"),
    "batch": (["--batch", "0"], "--batch 0: expected a whole number"),
    "batch of a range": (["--batch", "1:4:2"], "--batch 1:4:2: expected"),
    "workspace is no number": (["--workspace", "nan"], "--workspace"),
    "workspace without end": (["--workspace", "inf"], "--workspace"),
    "negative workspace": (["--workspace", "-1"], "--workspace"),
    "out is a file": (["--out", "file"], "--out file: a file of that name is there; expected a folder"),
    "out is not empty": (["--out", "full"], "--out full: not empty; expected a new folder, or --overwrite"),
    "out is in a file": (["--out", "file/engines"], "--out file/engines: cannot make .*file"),
    "out is too long": (["--out", "x" * 300], "--out x+: "),
    "out of an unknown user": (["--out", "~no-such-user/engines"], "--out ~no-such-user/engines: "),
    "timing cache of an unknown user": (["--timing-cache", "~no-such-user/cache"], "--timing-cache"),
    "adapter without a name": (["--adapter", "nowhere"], "--adapter 'nowhere'; expected name=path"),
    "adapter twice": (["--adapter", "a=1", "--adapter", "a=2"], "the name a is given twice"),
    "model": (["--model", "nowhere"], "model nowhere: no such file or folder"),
    "model is a picture": (
        ["--model", "file"],
        r"file: not a weight file \(no suffix\); expected a .safetensors file",
    ),
    "vae": (["--vae", "no-vae"], "vae no-vae: no such file or folder"),
    "lora": (["--lora", "no.safetensors"], "no.safetensors"),
    "adapter path": (
        ["--components", "adapter", "--adapter", "x=nowhere"],
        r"adapter x \(nowhere\): not found",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_built(capsys, made, case):
    more, message = BAD[case]
    Path("file").write_text("no folder")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("kept")
    assert run(*more) == 2
    (line,) = said(capsys)
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert made == []
    assert {path for path in listed(Path()) if not path.startswith(".")} == {"file", "full/notes.txt"}
    assert not OUT.exists()


def test_what_can_be_is_found_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(builder, "load", lambda settings: pytest.fail("loaded"))
    for case in (
        "height",
        "width of a range",
        "descending",
        "two sizes",
        "no size",
        "batch",
        "batch of a range",
    ):
        assert run(*BAD[case][0]) == 2, case


def test_a_build_that_did_not_begin_leaves_nothing_at_all():
    assert run("--model", "nowhere", "--out", "new/engines") == 2
    assert run("--height", "100") == 2
    assert listed(Path()) == set()


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root writes everywhere")
def test_a_parent_that_is_not_writable(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert run("--out", "locked/engines") == 2
    assert re.fullmatch("error: --out locked/engines: .*locked is not writable", *said(capsys))


def test_a_parent_that_cannot_be_made(monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run("--out", "locked/engines") == 2
    assert re.fullmatch("error: --out locked/engines: cannot make .*locked: Permission denied", *said(capsys))


def test_a_capability_that_tensorrt_for_rtx_does_not_support(capsys):
    pytest.importorskip("tensorrt_rtx")
    assert run("--compute-capability", "8.9", "9.0", target="tensorrt-rtx") == 2
    assert re.fullmatch(
        r"error: .* does not support compute capability 9\.0; it supports .*8\.9.*", *said(capsys)
    )
    assert not OUT.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tensorrt_builds_on_a_gpu_only(capsys):
    assert run(target="tensorrt") == 2
    assert re.fullmatch("error: .*target tensorrt.*(needs the package|there is none).*", *said(capsys))


@pytest.mark.parametrize(
    ("package", "target", "extra"),
    [
        ("onnx", "onnxruntime", "export"),
        ("onnxscript", "onnxruntime", "export"),
        ("onnxruntime", "onnxruntime", "export"),
        ("openvino", "openvino", "openvino"),
        ("tensorrt", "tensorrt", "tensorrt"),
        ("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx"),
    ],
)
def test_a_missing_package(monkeypatch, capsys, package, target, extra):
    monkeypatch.setitem(sys.modules, package, None)
    assert run(target=target) == 2
    assert re.fullmatch(
        rf"error: .* the package {package}; install it: pip install 'localcontrol\[{extra}\]'", *said(capsys)
    )
    assert not OUT.exists() and not PART.exists()


def test_nan_in_the_weights(tmp_path, capsys):
    model = saved_model.copy_folder(tmp_path)
    edit_tensors(
        model / "unet" / "diffusion_pytorch_model.safetensors", lambda t: t["conv_in.bias"].fill_(torch.nan)
    )
    assert run("--model", str(model)) == 2
    assert said(capsys) == [f"error: {model}: NaN or infinity in the weights, first in unet conv_in.bias"]
    assert not OUT.exists()


def test_a_model_that_is_cut_short(tmp_path, capsys):
    model = saved_model.copy_folder(tmp_path)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run("--model", str(model)) == 2
    assert re.fullmatch(rf"error: {weights}: not a whole .safetensors file.*", *said(capsys))
    assert not OUT.exists()


def test_an_adapter_of_other_channels(tmp_path, capsys):
    make_adapter(channels=(32, 32, 64, 64)).save_pretrained(tmp_path / "wide")
    assert run("--components", "adapter", "--adapter", "wide=wide") == 2
    assert re.fullmatch(r"error: adapter 'wide' has features of \(32, 32, 64, 64\) channels.*", *said(capsys))
    assert not OUT.exists()


@pytest.mark.parametrize("name", ["a/b", "../../b"])
def test_an_adapter_whose_name_is_no_file_name(capsys, made, name):
    assert run("--components", "adapter", "--adapter", f"{name}={engines.adapter()}") == 2
    assert re.search(re.escape(name), said(capsys)[-1])
    assert made == []
    assert not OUT.exists()


def shrink(monkeypatch, what: str) -> None:
    """Next to no disk, or no memory."""
    if what == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    else:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_too_little_room(monkeypatch, capsys, made, what):
    shrink(monkeypatch, what)
    assert run(target="openvino") == 2
    *stages, last = said(capsys)
    assert re.fullmatch(rf"error: --out .*: about [\d.]+ [GM]B of {what} needed, 1 MB free; .* --force", last)
    assert not any(line.startswith("error") for line in stages)
    assert made == []
    assert not OUT.exists()


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_too_little_room_by_force(monkeypatch, what):
    shrink(monkeypatch, what)
    assert run("--force", "--components", "text_encoder", target="openvino") == 0
    assert_whole()


def test_a_disk_that_is_full(monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "export_onnx", fail)
        assert run() == 2
    last = said(capsys)[-1]
    assert last.startswith("error: ") and "No space left on device" in last
    assert not OUT.exists()
    assert run("--resume") == 0


def test_two_builds_of_one_folder_at_a_time(monkeypatch, capsys):
    codes = []
    call = builder.compile_engine

    def build_again(*given):
        said(capsys)
        codes.append(run("--resume"))
        return call(*given)

    monkeypatch.setattr(builder, "compile_engine", build_again)
    assert run("--components", "text_encoder") == 0
    assert codes == [2]
    assert re.match(r"error: --out: another build is writing .*\.engines\.part", said(capsys)[0])
    assert list(assert_whole().engines) == ["text_encoder"]


def test_a_process_of_its_own_says_one_line(tmp_path):
    command = [sys.executable, "-m", "export.build_engine", *arguments("--model", "nowhere")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch("error: model nowhere: no such file or folder; .*\n", done.stderr)
