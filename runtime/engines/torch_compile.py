"""The UNet in PyTorch as an engine: compiled by torch.compile, captured as a CUDA graph, or both.

A step is then one call on tensors that stay the same, as with engines of other makers: inputs are filled in place, and
a graph that was captured once for a size is replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product, starmap

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes

from kernels.ops import current_backend
from runtime.engines.base import Engine
from runtime.engines.cuda_graph import captured
from runtime.engines.denoiser import EngineDenoiser
from runtime.engines.manifest import EngineSpec
from runtime.engines.ports import KEY, Axis, Profile, Range, numbered
from runtime.engines.unet_graph import Taken, UNetGraph, unet_ports
from runtime.loading.load import Model
from runtime.model.vae import vae_factor
from runtime.optimize.packed import unpack_weights

_compiling = threading.RLock()
GRAPHS = 8  # of as many numbers of texts, that are kept
SIDE, IMAGES, TOKENS, TEXTS = 2**15, 2**15, 2**15, 2**15  # larger than any


def compiled_for_any_size(function: Callable, compiler: str | Callable) -> Callable:
    """`function` by torch.compile; one graph for all sizes that are marked as dynamic.

    compiler: torch.compile's backend. Sizes of one row or one pixel, and equal ones, are sizes like all others. On a
    CPU PyTorch's convolutions choose by the number of rows: 1, 2 to 15, and 16 or more are compiled once each.
    """
    compiled: dict[str, Callable] = {}  # a graph keeps the kernels' backend it was traced with

    def call(*tensors: Tensor):
        backend = current_backend()
        if backend not in compiled:
            compiled[backend] = torch.compile(_copy(function), backend=compiler, fullgraph=True)
        # PyTorch's settings are the process's, and so is its compiler.
        with _compiling, symbolic_shapes.patch(backed_size_oblivious=True, use_duck_shape=False):
            return compiled[backend](*tensors)

    return call


def _copy(function: Callable) -> Callable:
    """Return a function of its own code, to which the compiler ties its graphs: another's are then none of its."""

    def own(*tensors: Tensor):
        return function(*tensors)

    own.__code__ = own.__code__.replace()
    return own


def compile_unet(model: Model, compiler: str | Callable | None, cuda_graph: bool) -> EngineDenoiser:
    """Return the model's UNet as one call a step; see `LocalControlPipeline.compile`."""
    if compiler is not None:
        unpack_weights(model.unet)
    variants = {
        taken: TorchEngine(UNetGraph(model.unet, *taken), vae_factor(model.vae), compiler, cuda_graph)
        for taken in starmap(Taken, product((False, True), repeat=2))
    }
    return EngineDenoiser(variants[Taken()], model.unet, variants)


def compile_decoder(vae: AutoencoderKL, compiler: str | Callable) -> None:
    """Have `vae` decode latents of any number and size by one compiled graph."""
    compiled = compiled_for_any_size(vae.decoder.forward, compiler)

    def forward(latents: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(latents, (0, 2, 3))
        return compiled(latents)

    vae.decoder.forward = forward


@dataclass(frozen=True)
class AnySize(Profile):
    """Sizes of a graph that is built for any, the tokens of a prompt and the texts of a picture among them."""

    tokens: Range = (1, 77, TOKENS)
    texts: Range = (1, 2, TEXTS)


class TorchEngine(Engine):
    """`UNetGraph`, for any size."""

    def __init__(self, graph: UNetGraph, factor: int, compiler: str | Callable | None, cuda_graph: bool):
        """factor: pixels of a latent's side. compiler: torch.compile's backend, None for none."""
        weight = graph.unet.conv_in.weight
        inputs, outputs = unet_ports(graph, Axis("tokens"), factor, Axis("texts"))
        spec = EngineSpec((), inputs, outputs, weight.dtype, weights="", onnx=None, layers={})
        profile = AnySize((1, 1, IMAGES), (16, 16, SIDE), (16, 16, SIDE))
        super().__init__(spec, profile, weight.device)
        self.cuda_graph = self.by_size = cuda_graph
        self._pool = torch.cuda.graph_pool_handle() if cuda_graph else None
        self._graph, self._compiler = graph, compiler
        self._compiled: dict[
            int, Callable
        ] = {}  # by the number of texts: the graph attends to one after the other

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        forward = self._graph
        if self._compiler is not None:
            for port in self.spec.inputs:
                sizes = [
                    i for i, size in enumerate(port.shape) if isinstance(size, Axis) and size.name != "texts"
                ]
                torch._dynamo.mark_dynamic(inputs[port.name], sizes)
            texts = inputs[numbered(KEY, 0)].shape[1] if self._graph.words else 1
            if texts not in self._compiled:
                while len(self._compiled) >= GRAPHS:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[texts] = compiled_for_any_size(self._graph, self._compiler)
            forward = self._compiled[texts]

        @torch.inference_mode()
        def run() -> None:
            results = forward(*inputs.values())
            for output, result in zip(outputs.values(), results, strict=True):
                output.copy_(result)

        return captured(run, self.device, self._pool) if self.cuda_graph else run
