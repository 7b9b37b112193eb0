"""Engines on OpenVINO: its own files, on the CPU, in bfloat16 where the processor computes in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from runtime.engines.base import Engine
from runtime.engines.manifest import EngineSpec, Manifest
from runtime.engines.ports import Axis, Port
from runtime.errors import InputError, first_line

PRECISIONS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# Bytes of weights up to which a model is compiled anew for every size that is called, 0.4 s for the embedded UNet: its
# steps are then 1.3 times as fast in fp32 and 1.4 times in bf16 as with sizes left open (one core, 128 x 128). Larger
# ones compute longer than they look after sizes, and a copy of their weights for every size would cost too much memory.
SMALL = 2**28
CAPABILITIES = {"f16": "FP16", "bf16": "BF16"}  # without it the processor computes in float32


class OpenVinoEngine(Engine):
    """A model that is compiled for each size; inputs and outputs share torch's memory."""

    def __init__(self, spec: EngineSpec, manifest: Manifest, core: ov.Core, model: ov.Model, small: bool):
        """small: whether each size may hold a compiled copy of the weights."""
        super().__init__(spec, manifest.profile, torch.device("cpu"))
        self.core, self.model, self.small = core, model, small
        self.by_size = small
        self._any_size: ov.CompiledModel | None = None

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        streams = self._streams(outputs)
        parts = [self._part({**inputs, **outputs}, i, streams) for i in range(streams)]
        compiled = self._compiled({name: parts[0][name] for name in inputs}, streams)
        requests = []
        for part in parts:
            requests.append(compiled.create_infer_request())
            for name, tensor in part.items():
                requests[-1].set_tensor(name, shared(tensor))

        def run() -> None:
            for request in requests:
                request.start_async()
            for request in requests:
                request.wait()

        return run

    def _streams(self, outputs: Mapping[str, Tensor]) -> int:
        """Return in how many equal parts the rows are computed at a time, each on its share of the cores.

        They wait for each other once instead of after every operation: on two cores a step of the embedded UNet is
        1.04 (8 pictures) to 1.1 times (1) as fast.
        """
        if not (self.small and all(map(has_rows, self.spec.outputs))):
            return 1
        return math.gcd(torch.get_num_threads(), *map(len, outputs.values()))

    def _part(self, tensors: Mapping[str, Tensor], index: int, parts: int) -> dict[str, Tensor]:
        """Return one of `parts` equal parts of the rows; what is the same for all rows is whole in each."""
        split = {port.name for port in self.spec.inputs + self.spec.outputs if has_rows(port)}
        return {
            name: tensor.chunk(parts)[index] if name in split else tensor for name, tensor in tensors.items()
        }

    def _compiled(self, inputs: Mapping[str, Tensor], streams: int) -> ov.CompiledModel:
        options = settings(self.core, self.spec.dtype, streams)
        try:
            if not self.small and not has_lone_pixel(inputs):
                self._any_size = self._any_size or self.core.compile_model(self.model, "CPU", options)
                return self._any_size
            model = self.model.clone()
            model.reshape({name: list(tensor.shape) for name, tensor in inputs.items()})
            return self.core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise InputError(
                f"engine: OpenVINO cannot compile {self.spec.files[0]}: {first_line(error)}"
            ) from error


def has_lone_pixel(inputs: Mapping[str, Tensor]) -> bool:
    """Return whether a map is a single pixel, as the deepest level of a picture of 32 x 32 is: one token to attend to.

    A model with sizes left open must not see it first. With AVX2, OpenVINO (2026.4.1) keeps the layout of such a
    value matrix, for which both orders of its axes are the same, and reads all later ones of 8 tokens or more
    wrongly: softmax(q k^T) v of 1 token, then of 9, is 20 times its value off.
    """
    return any(tensor.ndim == 4 and tensor.shape[2:].numel() == 1 for tensor in inputs.values())


def has_rows(port: Port) -> bool:
    """Return whether it is a batch, of which each row is computed by itself."""
    return isinstance(port.shape[0], Axis)


def shared(tensor: Tensor) -> ov.Tensor:
    """OpenVINO's view of a torch tensor's memory."""
    if tensor.dtype == torch.bfloat16:  # numpy has none
        return ov.Tensor(tensor.view(torch.uint16).numpy(), list(tensor.shape), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)


def open_engine(
    manifest: Manifest, spec: EngineSpec, path: Path, device: torch.device, weights: Mapping[str, Tensor]
) -> OpenVinoEngine:
    """See `runtime.engines.base.open_engine`."""
    if device.type != "cpu":
        raise InputError(f"engine: target openvino runs on the CPU, got {device}; expected --device cpu")
    core = the_core()
    try:
        model = core.read_model(path)
        replace_weights(model, weights)
        weight = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
        return OpenVinoEngine(spec, manifest, core, model, small=weight <= SMALL)
    except RuntimeError as error:
        raise InputError(f"engine {path}: OpenVINO cannot open it: {first_line(error)}") from error


@cache
def the_core() -> ov.Core:
    """Return the process's only core, never freed.

    OpenVINO's CPU plugin sets the stack that signal handlers run on. With several of them alive at a time, freeing one
    after another leaves it pointing at memory that is gone, and the next Ctrl-C is a segmentation fault (2026.4).
    """
    return ov.Core()


def settings(core: ov.Core, dtype: torch.dtype, streams: int = 1) -> dict[str, object]:
    """Return how a model whose arithmetic is `dtype` is compiled for this machine's CPU, to run `streams` times at
    once.
    """
    precision = PRECISIONS[dtype]
    if CAPABILITIES.get(precision, "FP32") not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        precision = "f32"
    return {
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }


def replace_weights(model: ov.Model, weights: Mapping[str, Tensor]) -> None:
    """Put other constants in place of the model's, by name; a linear layer's is stored transposed."""
    by_name = {**weights, **{f"{name}.T": tensor.T for name, tensor in weights.items() if tensor.ndim == 2}}
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_friendly_name() not in by_name:
            continue
        tensor = by_name[node.get_friendly_name()].contiguous()
        array = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        held = ov.Tensor(np.ascontiguousarray(array), list(tensor.shape), node.get_element_type())
        node.output(0).replace(ov.op.Constant(held, shared_memory=False).output(0))
