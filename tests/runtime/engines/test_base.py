"""Engines on ONNX Runtime and OpenVINO: the same values as torch's, memory bound once, and what is refused."""

import gc
import os
import signal
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from runtime.engines import openvino as engine_openvino
from runtime.engines.base import Engine, check_folder, open_engine, package_version
from runtime.engines.manifest import EngineSpec, Manifest, read_manifest
from runtime.engines.targets import TARGETS
from runtime.errors import InputError
from runtime.machine.arithmetic import DTYPES
from tests.support import engines
from tests.support.tolerances import RELATIVE_RMS

CPU = torch.device("cpu")


@cache
def manifest(target: str) -> Manifest:
    return read_manifest(engines.folder(target))


@cache
def engine(target: str, name: str) -> Engine:
    return open_engine(manifest(target), engines.folder(target), name, CPU)


def opened(target: str, name: str, changed: Manifest | None = None, device=CPU, weights=None) -> Engine:
    """A new engine, of a manifest that may have been changed."""
    return open_engine(changed or manifest(target), engines.folder(target), name, device, weights)


@pytest.mark.parametrize("name", engines.ENGINES)
def test_a_graph_is_exported(name):
    """Each in a test of its own, for the time it takes; everything else here has copies."""
    assert engines.graph(name).stat().st_size > 0


@pytest.mark.parametrize("index", range(3), ids=["smallest", "usual", "largest"])
@pytest.mark.parametrize("name", engines.ENGINES)
@pytest.mark.parametrize("target", engines.TARGETS)
def test_outputs_equal_torch(target, name, index):
    component = engines.component(name)
    sizes = engines.sizes_of(component, index)
    given = engines.random_inputs(component.inputs, sizes, seed=index)
    engines.assert_near(engine(target, name)(given, **sizes), engines.run_torch(component, given))


@pytest.mark.parametrize("sizes", [(32, 96), (96, 48), (80, 32)], ids=lambda size: f"{size[0]} x {size[1]}")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("target", engines.TARGETS)
def test_sizes_between_those_that_were_named(target, rows, sizes):
    component = engines.component("unet")
    size = {"rows": rows, "height": sizes[0], "width": sizes[1]}
    given = engines.random_inputs(component.inputs, size)
    engines.assert_near(engine(target, "unet")(given, **size), engines.run_torch(component, given))


@pytest.mark.parametrize(
    ("target", "precision"), [("onnxruntime", "fp16"), ("openvino", "fp16"), ("openvino", "bf16")]
)
def test_half_precision(target, precision):
    """Its inputs and outputs share torch's memory too, though numpy has no bf16."""
    component = engines.component("adapter_canny", precision)
    source = engines.graph("adapter_canny", precision)
    spec = EngineSpec(
        files=(source.name,),
        inputs=component.inputs,
        outputs=component.outputs,
        dtype=DTYPES[precision],
        weights="",
        onnx=None,
        layers={},
    )
    made = open_engine(replace(manifest(target), engines={"adapter": spec}), source.parent, "adapter", CPU)
    for index in range(3):
        sizes = engines.sizes_of(component, index)
        given = engines.random_inputs(component.inputs, sizes)
        outputs = made(given, **sizes)
        assert {tensor.dtype for tensor in outputs.values()} == {DTYPES[precision]}
        limit = RELATIVE_RMS["unet"][DTYPES[precision]]
        engines.assert_near(outputs, engines.run_torch(component, given), limit)


@pytest.mark.parametrize("target", engines.TARGETS)
def test_bind_allocates_once_a_size(target):
    decoder = opened(target, "vae_decoder")
    small = decoder.bind(items=1, height=32, width=32)
    large = decoder.bind(items=2, height=96, width=64)
    assert decoder.bind(width=32, height=32, items=1) is small
    assert large.inputs["latents"].shape == (2, 4, 12, 8)
    for bound in (small, large):
        bound.inputs["latents"].normal_()
    small.run()
    before, place = small.outputs["pixels"].clone(), small.outputs["pixels"].data_ptr()
    large.run()
    assert torch.equal(small.outputs["pixels"], before)
    small.run()
    assert torch.equal(small.outputs["pixels"], before)
    assert small.outputs["pixels"].data_ptr() == place


@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_call_gives_tensors_of_its_own(target):
    component = engines.component("text_encoder")
    first, second = (engines.random_inputs(component.inputs, {"items": 1}, seed) for seed in (0, 1))
    kept = engine(target, "text_encoder")(first, items=1)
    engine(target, "text_encoder")(second, items=1)
    engines.assert_near(kept, engines.run_torch(component, first))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 5}, r"rows of the UNet .* 5: .* built for 1 to 4; .* --batch and --guidance"),
        ({"height": 16}, r"height 16: .* built for 32 to 96; .* --height"),
        ({"height": 112}, r"height 112: .* built for 32 to 96"),
        ({"width": 1024}, r"width 1024: .* built for 32 to 96; .* --width"),
    ],
    ids=["rows 5", "height 16", "height 112", "width 1024"],
)
@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_size_that_was_not_built(target, sizes, message):
    unet = engine(target, "unet")
    before = len(unet._bindings)
    with pytest.raises(InputError, match=message):
        unet.bind(**{"rows": 1, "height": 64, "width": 64} | sizes)
    assert len(unet._bindings) == before  # nothing is left of it


def test_too_many_items():
    with pytest.raises(InputError, match=r"images 3: .* built for 1 to 2; .* --batch"):
        engine("onnxruntime", "text_encoder").bind(items=3)


@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_package(target, monkeypatch):
    package, extra = TARGETS[target].package, TARGETS[target].extra
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}; install it: pip install 'localcontrol\[{extra}\]'"):
        package_version(target)


@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_folder_of_a_package_that_is_missing(target, monkeypatch):
    monkeypatch.setitem(sys.modules, TARGETS[target].package, None)
    with pytest.raises(InputError, match=f"target {target} needs the package"):
        check_folder(manifest(target), engines.folder(target), CPU)


@pytest.mark.parametrize(
    ("target", "message"),
    [("openvino", "openvino runs on the CPU, got cuda:0"), ("onnxruntime", "no CUDAExecutionProvider")],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_it_does_not_run_on(target, message):
    with pytest.raises(InputError, match=message):
        opened(target, "unet", device=torch.device("cuda:0"))


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_needs_a_gpu(target):
    changed = replace(manifest("onnxruntime"), target=target)
    with pytest.raises(InputError, match=f"target {target} needs a CUDA device, got cpu; rebuild it: "):
        check_folder(changed, engines.folder("onnxruntime"), CPU)


def test_another_gpu_than_it_was_built_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    changed = replace(manifest("onnxruntime"), target="tensorrt-rtx", compute_capabilities=("8.9", "12.0"))
    message = r"compute_capabilities 8\.9, 12\.0, this GPU \(NVIDIA H200\) has 9\.0; rebuild it: "
    with pytest.raises(InputError, match=message):
        check_folder(changed, engines.folder("onnxruntime"), torch.device("cuda:0"))


def test_another_kind_of_gpu_than_it_was_built_on(monkeypatch):
    """TensorRT's kernels were chosen by what was fastest on one kind of GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    changed = replace(
        manifest("onnxruntime"), target="tensorrt", compute_capabilities=("9.0",), gpu="NVIDIA H100"
    )
    with pytest.raises(InputError, match=r"gpu NVIDIA H100, this one is NVIDIA H200; rebuild it: "):
        check_folder(changed, engines.folder("onnxruntime"), torch.device("cuda:0"))


def test_an_unknown_target():
    changed = replace(manifest("onnxruntime"), target="coreml")
    with pytest.raises(InputError, match=r"target 'coreml' is unknown; expected tensorrt, .*openvino"):
        check_folder(changed, engines.folder("onnxruntime"), CPU)


@pytest.mark.parametrize("target", engines.TARGETS)
def test_another_version_than_it_was_built_with(target):
    """A portable target's files run on later versions, not on earlier ones."""
    package = TARGETS[target].package
    versions = manifest(target).versions
    check_folder(
        replace(manifest(target), versions={**versions, package: "0.1"}), engines.folder(target), CPU
    )
    with pytest.raises(
        InputError, match=rf"built with {package} 9999\.0, here is .* install 9999\.0 or later"
    ):
        check_folder(
            replace(manifest(target), versions={**versions, package: "9999.0"}), engines.folder(target), CPU
        )


@pytest.mark.parametrize("target", engines.TARGETS)
def test_weights_without_refit(target):
    changed = replace(manifest(target), refit=False)
    weights = {"unet.conv_out.bias": torch.zeros(4)}
    with pytest.raises(InputError, match="built without --refit, so no weight can be exchanged"):
        opened(target, "unet", changed, weights=weights)


@pytest.mark.parametrize("name", ["unet", "text_encoder_2", "vae_decoder", "adapter_canny"])
@pytest.mark.parametrize("target", engines.TARGETS)
def test_every_weight_can_be_exchanged(target, name):
    """With all weights halved an engine computes what torch does from such; the one open before stays as it was."""
    component = engines.component(name)
    parameters = dict(component.module.named_parameters())
    sizes = engines.sizes_of(component, 1)
    given = engines.random_inputs(component.inputs, sizes)
    before = engine(target, name)(given, **sizes)
    halved = {key: tensor * 0.5 for key, tensor in parameters.items()}
    made = opened(target, name, weights=halved)(given, **sizes)
    expected = torch.func.functional_call(
        component.module, halved, tuple(given[port.name] for port in component.inputs)
    )
    expected = {port.name: tensor for port, tensor in zip(component.outputs, expected, strict=True)}
    engines.assert_near(made, expected)
    again = opened(target, name)(given, **sizes)
    for key, tensor in before.items():
        assert torch.equal(again[key], tensor)
        assert not torch.allclose(made[key], tensor, rtol=1e-2)
    check_folder(manifest(target), engines.folder(target), CPU)  # the files are as they were


@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_file_that_is_no_engine(target, tmp_path):
    """What the runtime says of it is one line of ours: here the hashes were not checked before."""
    folder = engines.copy_folder(target, tmp_path)
    (folder / manifest(target).engines["unet"].files[0]).write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"engine .*unet\.(onnx|xml): .* cannot open it: ") as caught:
        open_engine(manifest(target), folder, "unet", CPU)
    assert "\n" not in str(caught.value)


def test_a_large_openvino_model_is_compiled_once_for_all_sizes(monkeypatch):
    """A copy of its weights for every size would not fit into memory."""
    monkeypatch.setattr(engine_openvino, "SMALL", 0)
    component, engine = engines.component("unet"), opened("openvino", "unet")
    compiled = set()
    for index in range(3):
        sizes = engines.sizes_of(component, index)
        inputs = engines.random_inputs(component.inputs, sizes, index)
        engines.assert_near(engine(inputs, **sizes), engines.run_torch(component, inputs))
        compiled.add(id(engine._any_size))
    assert len(compiled - {id(None)}) == 1


@pytest.mark.parametrize("sizes", [[(32, 32), (96, 96)], [(32, 32), (96, 48), (32, 32)]], ids=str)
def test_a_picture_with_a_single_deepest_pixel_leaves_the_next_ones_right(monkeypatch, sizes):
    """OpenVINO with AVX2 alone keeps the layout of one token's values and reads nine wrongly, 4e-3 off in the end."""
    monkeypatch.setattr(engine_openvino, "SMALL", 0)
    component, made = engines.component("unet"), opened("openvino", "unet")
    for height, width in sizes:
        size = {"rows": 1, "height": height, "width": width}
        given = engines.random_inputs(component.inputs, size)
        engines.assert_near(made(given, **size), engines.run_torch(component, given))


def test_a_signal_after_openvino_engines_came_and_went():
    """Several of OpenVINO's cores leave a freed stack for signal handlers behind: Ctrl-C would be a crash."""
    for _ in range(3):
        held = [opened("openvino", name) for name in ("vae_decoder", "text_encoder")]
        held[0].bind(items=1, height=64, width=64)
        held[1].bind(items=1)
        held.clear()
        gc.collect()
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received


@pytest.mark.parametrize(("name", "axis"), [("unet", "rows"), ("vae_decoder", "items")])
def test_openvino_computes_as_many_rows_at_a_time_as_there_are_cores(name, axis, monkeypatch):
    component, calls = engines.component(name), []
    start = engine_openvino.ov.InferRequest.start_async
    monkeypatch.setattr(
        engine_openvino.ov.InferRequest, "start_async", lambda *of: (calls.append(of), start(*of))
    )
    before = torch.get_num_threads()
    try:
        for threads, rows, at_once in ((1, 2, 1), (2, 2, 2), (2, 1, 1), (4, 2, 2)):
            torch.set_num_threads(threads)
            sizes = engines.sizes_of(component, 1) | {axis: rows}
            inputs = engines.random_inputs(component.inputs, sizes)
            calls.clear()
            made = opened("openvino", name)(inputs, **sizes)
            assert len(calls) == at_once
            engines.assert_near(made, engines.run_torch(component, inputs))
    finally:
        torch.set_num_threads(before)
