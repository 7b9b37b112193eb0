"""The UNet in PyTorch as an engine: compiled by torch.compile, captured as a CUDA graph, or both.

A step is then one call on tensors that stay the same, as with engines of other makers: inputs are filled in place, and
a graph that was captured once for a size is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes

from runtime.engine import Engine
from runtime.errors import InputError
from runtime.manifest import EngineSpec
from runtime.profile import Axis, Profile
from runtime.unet import UNet
from runtime.unet_graph import UNetGraph, unet_ports

SIDE, IMAGES = 2**15, 2**15  # larger than any
WARM_UP = 3  # runs before a capture, as PyTorch's documentation has it: libraries choose and allocate in them


class TorchEngine(Engine):
    """`UNetGraph`, for any size."""

    def __init__(
        self, unet: UNet, tokens: int, factor: int, compiler: str | Callable | None, cuda_graph: bool
    ):
        """tokens: of a prompt. factor: pixels of a latent's side. compiler: torch.compile's backend, None for none.

        Raises InputError for a CUDA graph of a UNet that is not on a GPU.
        """
        graph, weight = UNetGraph(unet), unet.conv_in.weight
        if cuda_graph and weight.device.type != "cuda":
            raise InputError(f"cuda graph: the UNet is on {weight.device}, expected a CUDA device")
        inputs, outputs = unet_ports(graph, tokens, factor)
        spec = EngineSpec((), inputs, outputs, weight.dtype, weights="", onnx=None, layers={})
        profile = Profile((1, 1, IMAGES), (16, 16, SIDE), (16, 16, SIDE))
        super().__init__(spec, profile, weight.device)
        self.cuda_graph, self._pool = cuda_graph, None
        self._forward = graph if compiler is None else torch.compile(graph, backend=compiler, fullgraph=True)
        self._marks = compiler is not None

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        if self._marks:
            for port in self.spec.inputs:
                sizes = [i for i, size in enumerate(port.shape) if isinstance(size, Axis)]
                torch._dynamo.mark_dynamic(inputs[port.name], sizes)

        @torch.inference_mode()
        def run() -> None:
            # Sizes of one row or one pixel are sizes like all others: they need no graph of their own.
            with symbolic_shapes.patch(backed_size_oblivious=True):
                results = self._forward(*inputs.values())
            for output, result in zip(outputs.values(), results, strict=True):
                output.copy_(result)

        return self._captured(run) if self.cuda_graph else run

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """`run` as a CUDA graph. Graphs of all sizes share their memory: one runs at a time."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = graph.pool()
        return graph.replay
