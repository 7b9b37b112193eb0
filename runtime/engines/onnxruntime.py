"""Engines on ONNX Runtime: the ONNX files themselves, on the CPU or a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from runtime.engines.base import Engine
from runtime.engines.manifest import EngineSpec, Manifest
from runtime.errors import InputError, first_line

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
    """See `runtime.engines.base.open_engine`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    # Between two calls the cores belong to PyTorch's own threads. A picture on two cores: 295 -> 215 ms.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model, kept = _exchange(path, weights, options) if weights else (str(path), [])
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise InputError(
            f"engine: this onnxruntime has no {provider}; install onnxruntime-gpu, or take --device cpu"
        )
    providers = [(provider, {"device_id": device.index or 0})] if device.type == "cuda" else [provider]
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own exceptions have no common class
        raise InputError(f"engine {path}: ONNX Runtime cannot open it: {first_line(error)}") from error
    if provider not in session.get_providers():  # it goes on without one whose libraries are missing
        raise InputError(
            f"engine: ONNX Runtime could not start its {provider}; expected CUDA and cuDNN, or a CPU"
        )
    engine = OnnxRuntimeEngine(spec, manifest, device, session)
    engine.kept = kept  # the session uses this memory without owning it
    return engine


def _exchange(
    path: Path, weights: Mapping[str, Tensor], options: ort.SessionOptions
) -> tuple[bytes, list[np.ndarray]]:
    """Return the ONNX file with other weights, where they are in the file itself; those beside it go into `options`.

    A linear layer's weight is stored transposed. Also returns what must live as long as the session.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    beside: dict[str, np.ndarray] = {}
    for stored in model.graph.initializer:
        name = stored.name.removesuffix(".T")
        if name not in weights:
            continue
        tensor = weights[name].T if stored.name != name else weights[name]
        array = tensor.contiguous().cpu().numpy()
        if stored.data_location == onnx.TensorProto.EXTERNAL:
            beside[stored.name] = array
        else:
            stored.CopyFrom(onnx.numpy_helper.from_array(array, stored.name))
    if beside:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in beside.values()]
        options.add_external_initializers(list(beside), values)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return model.SerializeToString(), list(beside.values())
