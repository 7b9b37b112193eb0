"""Real engines of TensorRT for RTX, built without a GPU for others; running them needs one (tests marked gpu)."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from export.targets.compile import check_target, compile_engine
from export.targets.options import Compiled, CompileOptions
from export.targets.tensorrt import DEFAULT, _config, check_capabilities, supported, timing_cache_path
from runtime.errors import InputError
from tests.support import engines

trt = pytest.importorskip("tensorrt_rtx")

OPTIONS = CompileOptions("tensorrt-rtx", ("8.9",), level=0)
CAPABILITIES = ("8.9", "12.0")


def build(name: str, to: Path, options: CompileOptions = OPTIONS, source=None, progress=None) -> Compiled:
    """Compile one of the tiny model's graphs in fp16."""
    profile = engines.STATIC if name == "unet" else engines.PROFILE  # open sizes take 20 s more to export
    source = source or engines.graph(name, "fp16", profile)
    ports = engines.component(name, "fp16").inputs
    return compile_engine(source, to, ports, torch.float16, profile, options, progress)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["unet", "adapter_canny"])
def test_it_builds(name, capability, tmp_path):
    steps = []
    options = replace(OPTIONS, capabilities=(capability,))
    made = build(name, tmp_path, options, progress=lambda *step: steps.append(step))
    assert made.files == (tmp_path / f"{name}.engine",)
    weights = sum(p.nbytes for p in engines.component(name, "fp16").module.parameters())
    assert made.files[0].stat().st_size > weights
    assert made.layers["HALF"] > made.layers.get("FLOAT", 0)
    assert steps and all(0 <= done <= total for _, done, total in steps)


def test_it_builds_in_bf16_for_one_size(tmp_path):
    """TensorRT's parser takes no Resize in bf16."""
    source, profile = engines.graph("unet", "bf16", engines.STATIC), engines.STATIC
    ports = engines.component("unet", "bf16").inputs
    made = compile_engine(source, tmp_path, ports, torch.bfloat16, profile, OPTIONS)
    assert made.layers["BF16"] > 2 * made.layers.get("FLOAT", 0)


def test_the_gpu_is_in_the_engine(tmp_path):
    made = {}
    for capability in CAPABILITIES:
        folder = tmp_path / capability
        folder.mkdir()
        options = replace(OPTIONS, capabilities=(capability,))
        made[capability] = build("adapter_canny", folder, options).files[0].read_bytes()
    assert made["8.9"] != made["12.0"]
    options = replace(OPTIONS, capabilities=CAPABILITIES)
    assert build("adapter_canny", tmp_path, options).files[0].read_bytes() not in made.values()


def test_the_compiler_is_told_the_options():
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    options = CompileOptions("tensorrt-rtx", CAPABILITIES, level=2, workspace=2**28, refit=True)
    config = _config(trt, builder, engines.component("unet", "fp16").inputs, engines.PROFILE, options)
    assert config.get_flag(trt.BuilderFlag.REFIT)
    assert config.builder_optimization_level == 2
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 2**28
    told = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert told == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]
    assert not _config(trt, builder, (), engines.PROFILE, OPTIONS).get_flag(trt.BuilderFlag.REFIT)


@pytest.mark.gpu
def test_refit_on_a_gpu(tmp_path):
    assert build("adapter_canny", tmp_path, replace(OPTIONS, refit=True)).files[0].stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refit_without_a_gpu(tmp_path):
    """TensorRT for RTX builds a refittable engine on a GPU only: said in our words, not in its compiler's."""
    with pytest.raises(InputError, match=r"--refit.*GPU"):
        build("adapter_canny", tmp_path, replace(OPTIONS, refit=True))
    assert not list(tmp_path.iterdir())


def test_supported():
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(supported(trt))
    assert "9.0" not in supported(trt)
    assert set(DEFAULT) <= set(supported(trt))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_builds_for_the_usual_ones():
    assert check_capabilities("tensorrt-rtx", ()) == DEFAULT
    assert check_capabilities("tensorrt-rtx", ("12.0", "8.9")) == ("12.0", "8.9")


def test_this_machines_gpu_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert check_capabilities("tensorrt-rtx", ()) == ("8.9",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(InputError, match=r"compute capability 9\.0"):
        check_capabilities("tensorrt-rtx", ())


@pytest.mark.parametrize("wanted", ["9.0", "10.0", "8.7", "nine"])
def test_a_gpu_that_it_does_not_support(wanted):
    message = (
        rf"does not support compute capability {wanted}; it supports 7\.5, .*8\.9, 12\.0.*--target tensorrt"
    )
    with pytest.raises(InputError, match=message) as caught:
        check_target("tensorrt-rtx", "fp16", ("8.9", wanted))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["no ONNX", "cut short", "weights missing"])
def test_a_corrupt_file(damage, tmp_path):
    source = tmp_path / "adapter_canny.onnx"
    content = engines.graph("adapter_canny", "fp16").read_bytes()
    source.write_bytes(
        {"no ONNX": b"no graph", "cut short": content[: len(content) // 2]}.get(damage, content)
    )
    with pytest.raises(InputError, match=r"adapter_canny\.onnx: the ONNX parser refuses it: .*\w") as caught:
        build("adapter_canny", tmp_path, source=source)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_canny.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_in_the_progress_callback_comes_out(error, tmp_path):
    """A KeyboardInterrupt reaches Python there: it must not be lost in C++."""
    calls = []

    def progress(*step):
        calls.append(step)
        raise error("stop")

    with pytest.raises(error, match="stop"):
        build("adapter_canny", tmp_path, progress=progress)
    assert len(calls) < 20  # it stopped soon
    assert not list(tmp_path.iterdir())


def test_timings_need_a_home_or_a_folder_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = SimpleNamespace(__version__="10")
    assert timing_cache_path(here) == tmp_path / "localcontrol/timing/nvidia-h100-tensorrt-10.cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    # a container's user that is a number alone
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(InputError, match="XDG_CACHE_HOME ~/.cache: no such user"):
        timing_cache_path(here)
