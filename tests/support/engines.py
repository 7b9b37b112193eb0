"""Engine folders of the tiny SDXL, built once a run as a user builds them, and the graphs in them."""

import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from export import build as builder
from export import build_engine
from export.graphs import Component, make_components
from export.onnx_export import export_onnx
from runtime.engines import verified
from runtime.engines.manifest import read_manifest
from runtime.engines.ports import CONDITION, MASK, STRENGTHS, Port, Profile
from runtime.loading.adapter import load_adapter
from runtime.loading.load import Model, load_model
from runtime.machine.arithmetic import DTYPES
from tests.support import saved_model
from tests.support.tiny import make_adapter
from tests.support.tolerances import relative_rms

PROFILE = Profile(images=(1, 1, 2), height=(32, 64, 96), width=(32, 64, 96))
STATIC = Profile(images=(1, 1, 1), height=(64, 64, 64), width=(96, 96, 96), guidance="always")
TARGETS = ("onnxruntime", "openvino")
COMPONENTS = ("text_encoder", "text_encoder_2", "adapter", "unet", "vae_decoder", "vae_encoder")
ENGINES = tuple(name.replace("adapter", "adapter_canny") for name in COMPONENTS)

_DIRECTORY = tempfile.TemporaryDirectory(prefix="localcontrol-engines-")  # removed when the run ends


@cache
def adapter() -> Path:
    """The tiny adapter, saved as diffusers does: it is called canny in the engine folders."""
    path = Path(_DIRECTORY.name) / "adapter"
    make_adapter().save_pretrained(path)
    return path


@cache
def model(precision: str = "fp32") -> Model:
    """The model that is compiled, in torch: not to be changed."""
    return load_model(saved_model.folder(), dtype=DTYPES[precision])


@cache
def component(name: str, precision: str = "fp32") -> Component:
    """One of `ENGINES` as a torch module with named inputs and outputs."""
    options = {"device": "cpu", "dtype": DTYPES[precision]}
    kind = name.partition("_canny")[0]
    adapters = {"canny": load_adapter(adapter(), **options).requires_grad_(False)} if kind != name else {}
    return next(make_components(model(precision), adapters, [kind]))


@cache
def graph(name: str, precision: str = "fp32", profile: Profile = PROFILE) -> Path:
    """One of `ENGINES` as an ONNX file, exported once a process."""
    path = Path(_DIRECTORY.name) / f"{precision}-{profile.guidance}" / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True)
    export_onnx(component(name, precision), profile, path)
    return path


def folder(target: str, components: tuple[str, ...] = COMPONENTS) -> Path:
    """An engine folder in fp32 for the sizes of `PROFILE`, with copies of `graph`'s files: not to be changed."""
    return _folder(target, components)


@cache
def _folder(target: str, components: tuple[str, ...]) -> Path:
    path = Path(_DIRECTORY.name) / f"{target} {' '.join(components)}"
    arguments = ["--model", str(saved_model.folder()), "--adapter", f"canny={adapter()}"]
    arguments += ["--precision", "fp32", "--components", ",".join(components), *sizes_arguments(PROFILE)]
    return build(path, "--target", target, *arguments, graphs={name: graph(name) for name in ENGINES})


def sizes_arguments(profile: Profile) -> list[str]:
    """The profile's sizes as the command line takes them."""
    sizes = {"--batch": profile.images, "--height": profile.height, "--width": profile.width}
    named = [part for name, size in sizes.items() for part in (name, ":".join(map(str, size)))]
    return [*named, "--guidance", profile.guidance]


def graphs_of(folder: Path) -> dict[str, Path]:
    """The ONNX files of an engine folder, by the names of their engines."""
    return {name: folder / "onnx" / f"{name}.onnx" for name in read_manifest(folder).engines}


def build(path: Path, *arguments: str, graphs: Mapping[str, Path] | None = None) -> Path:
    """Build an engine folder with the command line.

    graphs: ONNX files of the same model, precision and sizes, which are copied instead of exported again.
    """

    def copy_graph(component: Component, profile: Profile, to: Path, progress=None) -> None:
        source = graphs[component.name]
        for file in (source, source.with_name(f"{source.name}.data")):
            if file.exists():
                shutil.copy(file, to.with_name(file.name))

    with pytest.MonkeyPatch.context() as patch:
        if graphs is not None:
            patch.setattr(builder, "export_onnx", copy_graph)
        assert build_engine.main([*arguments, "--out", str(path), "--no-verify"]) == 0
    # tests/runtime/engines/test_base.py compares; opening does not warn
    verified.note(read_manifest(path), path, torch.device("cpu"), {}, passed=True)
    return path


def copy_folder(target: str, to: Path, components: tuple[str, ...] = COMPONENTS) -> Path:
    """A copy of the folder that a test may spoil."""
    return shutil.copytree(folder(target, components), to / "engines")


def random_inputs(ports: tuple[Port, ...], sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a graph at these sizes: token ids, masks and strengths in [0, 1], noise for all else."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for port in ports:
        shape = port.sized(sizes)
        if port.dtype == torch.int64:
            made[port.name] = torch.randint(0, 40, shape, generator=generator)
        elif port.name.startswith((MASK, CONDITION, STRENGTHS)):
            made[port.name] = torch.rand(shape, generator=generator)
        else:
            made[port.name] = torch.randn(shape, generator=generator).to(port.dtype)
    return made


def sizes_of(component: Component, index: int, profile: Profile = PROFILE) -> dict[str, int]:
    """The sizes that a component's inputs depend on: smallest, usual or largest of the profile, by `index`."""
    axes = {size.name for port in component.inputs for size in port.shape if not isinstance(size, int)}
    return {name: profile.range(name)[index] for name in axes}


@torch.inference_mode()
def run_torch(component: Component, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the component's own module computes."""
    outputs = component.module(*(inputs[port.name] for port in component.inputs))
    return {port.name: tensor for port, tensor in zip(component.outputs, outputs, strict=True)}


def run_onnx(source: Path | bytes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ONNX Runtime computes from a file, or from a model's bytes."""
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {name: np.ascontiguousarray(x.numpy()) for name, x in inputs.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-4) -> None:
    """Fail, naming the output, unless all are within a relative RMS error."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert (error := relative_rms(actual[name], tensor)) <= limit, f"{name}: {error:.1e} > {limit:.0e}"
