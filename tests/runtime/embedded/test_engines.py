"""The embedded model on engines: exported once, run by ONNX Runtime and OpenVINO, built by TensorRT for RTX."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.graphs import Component, make_components
from export.onnx_export import export_onnx
from kernels import ops
from runtime import LocalControlPipeline, generate
from runtime.engines.base import open_engine
from runtime.engines.manifest import read_manifest
from runtime.engines.ports import Profile
from tests.support import engines

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
# One size: open ones take 20 s longer to export, and are the tiny model's matter (tests/runtime/engines/test_base.py).
PROFILE = Profile((1, 1, 1), (128, 128, 128), (128, 128, 128), guidance="always")
COMPONENTS = ("text_encoder", "text_encoder_2", "adapter", "unet", "vae_decoder")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_graph_is_exported(name, root):
    """Each in a test of its own, for the time it takes; the folders below have copies of them."""
    assert graph(name, root).stat().st_size > 0


def graph(name: str, root: Path) -> Path:
    """One of COMPONENTS as an ONNX file, exported once."""
    component = components()[name.replace("adapter", "adapter_canny")]
    path = root / f"{component.name}.onnx"
    if not path.exists():
        export_onnx(component, PROFILE, path)
    return path


@pytest.fixture(scope="module")
def folders(root) -> dict[str, Path]:
    """A folder for each target."""
    graphs, made = {path.stem: path for path in (graph(name, root) for name in COMPONENTS)}, {}
    for target in engines.TARGETS:
        arguments = ["--target", target, "--precision", "fp32", *engines.sizes_arguments(PROFILE)]
        made[target] = engines.build(root / target, *arguments, graphs=graphs)
    return made


@cache
def components() -> dict[str, Component]:
    """The embedded model in torch."""
    pipe = LocalControlPipeline.from_pretrained(device="cpu", dtype="fp32")
    return {made.name: made for made in make_components(pipe.model, pipe.adapters, COMPONENTS)}


@pytest.mark.parametrize("target", engines.TARGETS)
def test_every_graph_equals_torch(folders, target):
    manifest = read_manifest(folders[target])
    assert manifest.engines.keys() == components().keys()
    for name, component in components().items():
        engine = open_engine(manifest, folders[target], name, torch.device("cpu"))
        sizes = engines.sizes_of(component, 1, PROFILE)
        given = engines.random_inputs(component.inputs, sizes, seed=1)
        engines.assert_near(engine(given, **sizes), engines.run_torch(component, given))


def picture(to: Path, *arguments: str) -> np.ndarray:
    """The README's picture, 30 steps, by the command line."""
    control = ["--condition", str(EXAMPLES / "sketch.png"), "--preprocess", "sketch"]
    control += ["--mask", str(EXAMPLES / "mask-left.png")]
    prompt = ["--prompt", "a red star and a blue square on sand", "--seed", "7"]
    assert generate.main([*prompt, *control, *arguments, "--out", str(to)]) == 0
    return np.asarray(Image.open(to), dtype=float)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> np.ndarray:
    """The picture in torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "INTERPRETED", False)
        return picture(tmp_path_factory.mktemp("torch") / "out.png", "--device", "cpu", "--dtype", "fp32")


@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_whole_picture_equals_torch(folders, target, expected, tmp_path, monkeypatch):
    """Within a grey level on average; without the mask it is another picture."""
    monkeypatch.setattr(ops, "INTERPRETED", False)
    made = picture(tmp_path / "out.png", "--engine", str(folders[target]))
    assert made.shape == expected.shape == (128, 128, 3)
    assert np.abs(made - expected).mean() < 1
    free = picture(tmp_path / "free.png", "--engine", str(folders[target]), "--scale", "0")
    assert np.abs(free - expected).mean() > 3


def test_tensorrt_rtx_builds_every_graph(folders, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    arguments = ["--target", "tensorrt-rtx", "--compute-capability", "8.9", "12.0", "--level", "0"]
    arguments += ["--precision", "fp32", *engines.sizes_arguments(PROFILE)]
    folder = engines.build(tmp_path / "rtx", *arguments, graphs=engines.graphs_of(folders["onnxruntime"]))
    manifest = read_manifest(folder)
    assert manifest.compute_capabilities == ("8.9", "12.0")
    assert manifest.engines.keys() == components().keys()
    for name, spec in manifest.engines.items():
        assert spec.files == (f"engines/{name}.engine",)
        weights = (folders["onnxruntime"] / "onnx" / f"{name}.onnx.data").stat().st_size
        assert manifest.files[spec.files[0]]["bytes"] > 0.9 * weights, name
