"""Engines on TensorRT and on TensorRT for RTX, which share one Python interface.

An engine's scratch memory is one buffer for all its sizes, since they never run at the same time. TensorRT's calls are
captured in a CUDA graph for each size, all in one memory pool; TensorRT for RTX compiles its kernels at the first calls
of a size, and captures graphs itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from runtime.engines.base import Engine
from runtime.engines.cuda_graph import captured
from runtime.engines.manifest import EngineSpec, Manifest
from runtime.engines.targets import TARGETS
from runtime.errors import InputError


class TensorRTEngine(Engine):
    """A deserialized engine with one execution context for each size."""

    def __init__(self, spec: EngineSpec, manifest: Manifest, device: torch.device, trt, engine):
        super().__init__(spec, manifest.profile, device)
        self.trt, self.engine = trt, engine
        # enough for the largest size; TensorRT asks for that much whatever size it runs
        self.scratch = torch.empty(engine.device_memory_size_v2, dtype=torch.uint8, device=device)
        self.pool = torch.cuda.graph_pool_handle()
        self.config = engine.create_runtime_config() if is_rtx(trt) else None
        if self.config is not None:
            self.config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.config.set_execution_context_allocation_strategy(
                trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        context = self._context()
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise InputError(f"engine: TensorRT refuses {name} of {tuple(tensor.shape)}")
        for name, tensor in {**inputs, **outputs}.items():
            context.set_tensor_address(name, tensor.data_ptr())
        context.set_device_memory(self.scratch.data_ptr(), self.scratch.numel())

        def enqueue() -> None:
            if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
                raise RuntimeError("TensorRT could not run the engine: its message is above")

        if self.config is not None:
            return enqueue
        replay = captured(enqueue, self.device, self.pool)

        def run(context=context) -> None:  # a captured graph uses the context without owning it
            replay()

        return run

    def _context(self):
        if self.config is not None:
            return self.engine.create_execution_context(self.config)
        return self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def open_engine(
    manifest: Manifest, spec: EngineSpec, path: Path, device: torch.device, weights: Mapping[str, Tensor]
) -> TensorRTEngine:
    """See `runtime.engines.base.open_engine`."""
    trt = importlib.import_module(TARGETS[manifest.target].package)
    logger = trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise InputError(f"engine {path}: {manifest.target} cannot open it here; {manifest.rebuild}")
    if weights:
        refit(trt, logger, engine, weights)
    return TensorRTEngine(spec, manifest, device, trt, engine)


def refit(trt, logger, engine, weights: Mapping[str, Tensor]) -> None:
    """Exchange the weights of these parameters in a deserialized engine; the file stays as it is."""
    refitter, held = trt.Refitter(engine, logger), []
    known = set(refitter.get_all_weights())
    for name, tensor in weights.items():
        for stored, value in ((name, tensor), (f"{name}.T", tensor.T if tensor.ndim == 2 else tensor)):
            if stored in known:
                value = value.contiguous().cpu()
                held.append(value)  # the refitter takes addresses, not copies
                prototype = refitter.get_weights_prototype(stored)
                refitter.set_named_weights(
                    stored, trt.Weights(prototype.dtype, value.data_ptr(), value.numel())
                )
    if missing := refitter.get_missing_weights():
        raise InputError(f"engine: refitting needs {len(missing)} more weights, first {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise InputError("engine: TensorRT refused the weights; its message is above")


def is_rtx(trt) -> bool:
    return trt.__name__ == "tensorrt_rtx"
