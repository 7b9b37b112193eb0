"""ONNX files to engines, whatever the target: TensorRT, TensorRT for RTX, ONNX Runtime, OpenVINO."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import torch

from export.targets.options import Compiled, CompileOptions, Progress
from runtime.engines.base import package_version
from runtime.engines.ports import Port, Profile
from runtime.engines.targets import TARGETS
from runtime.errors import InputError

GIB = 2**30
# Peak memory of compiling over the size of the weights, and on top of it; measured with SDXL's UNet in fp16
# (benchmarks/results/cpu/export.csv).
MEMORY = {
    "tensorrt": (3.7, GIB),
    "tensorrt-rtx": (3.7, GIB),
    "openvino": (3.0, GIB),
    "onnxruntime": (0.0, 0),
}


def compile_engine(
    source: Path,
    folder: Path,
    inputs: tuple[Port, ...],
    dtype: torch.dtype,
    profile: Profile,
    options: CompileOptions,
    progress: Progress | None = None,
) -> Compiled:
    """Compile an ONNX file into `folder`; InputError where the compiler refuses it."""
    if options.target in ("tensorrt", "tensorrt-rtx"):
        from export.targets.tensorrt import build

        return build(source, folder / f"{source.stem}.engine", inputs, profile, options, progress)
    if options.target == "openvino":
        from export.targets import openvino as compile_openvino

        return compile_openvino.build(source, folder / f"{source.stem}.xml", dtype)
    return Compiled((source, source.with_name(f"{source.name}.data")), _onnx_layers(source))


def check_target(
    target: str, precision: str, capabilities: tuple[str, ...] = (), refit: bool = False
) -> tuple[str, ...]:
    """Return the compute capabilities to build for; InputError where target, precision, GPU and refit do not go
    together.
    """
    if target not in TARGETS:
        raise InputError(f"--target {target}: expected {', '.join(TARGETS)}")
    package_version(target)
    if target == "onnxruntime" and precision == "bf16":
        raise InputError("--precision bf16: ONNX Runtime has no bf16 kernels for it; expected fp32 or fp16")
    if not TARGETS[target].gpu:
        if capabilities:
            raise InputError(f"--compute-capability: target {target} takes none")
        return ()
    from export.targets.tensorrt import check_capabilities, check_refit

    check_refit(target, refit)
    return check_capabilities(target, capabilities)


def _onnx_layers(source: Path) -> dict[str, int]:
    """Return how many nodes give each type, by the graph's own types."""
    graph = onnx.load(source, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    names = Counter(types.get(name, 0) for node in graph.node for name in node.output)
    return {onnx.TensorProto.DataType.Name(kind): count for kind, count in names.most_common() if kind}
