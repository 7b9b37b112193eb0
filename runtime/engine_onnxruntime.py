"""Engines on ONNX Runtime: the ONNX files themselves, on the CPU or a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from runtime.engine import Engine
from runtime.errors import InputError
from runtime.manifest import EngineSpec, Manifest
from runtime.weights import first_line

ELEMENTS = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


class OnnxRuntimeEngine(Engine):
    """An inference session; inputs and outputs are bound to torch's memory."""

    def __init__(
        self, spec: EngineSpec, manifest: Manifest, device: torch.device, session: ort.InferenceSession
    ):
        super().__init__(spec, manifest.profile, device)
        self.session = session

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        binding, place = self.session.io_binding(), (self.device.type, self.device.index or 0)
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, *place, ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())

        def run() -> None:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # the session has a stream of its own
            self.session.run_with_iobinding(binding)

        return run


def open_engine(
    manifest: Manifest, spec: EngineSpec, path: Path, device: torch.device, weights: Mapping[str, Tensor]
) -> OnnxRuntimeEngine:
    """See `runtime.engine.open_engine`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if weights:
        values = _stored(path, weights)
        options.add_external_initializers(
            list(values), [ort.OrtValue.ortvalue_from_numpy(v) for v in values.values()]
        )
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise InputError(
            f"engine: this onnxruntime has no {provider}; install onnxruntime-gpu, or take --device cpu"
        )
    providers = [(provider, {"device_id": device.index or 0})] if device.type == "cuda" else [provider]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's own exceptions have no common class
        raise InputError(f"engine {path}: ONNX Runtime cannot open it: {first_line(error)}") from error
    return OnnxRuntimeEngine(spec, manifest, device, session)


def _stored(path: Path, weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The weights under the names and in the layouts of the ONNX file: a linear layer's is stored transposed."""
    import onnx

    names = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    return {
        stored: (tensor.T if stored != name else tensor).contiguous().numpy()
        for name, tensor in weights.items()
        for stored in (name, f"{name}.T")
        if stored in names
    }
