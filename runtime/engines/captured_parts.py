"""Text encoders and T2I-Adapters as CUDA graphs: hundreds of small launches, for which the GPU would wait."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from runtime.control.adapters import Adapter
from runtime.engines.cuda_graph import captured
from runtime.errors import first_line
from runtime.loading.load import Model

SIZES = 8  # of each part that are kept: numbers of chunks of text, or sizes of conditions


@dataclass(frozen=True)
class Recorded:
    """A graph with the tensors it reads and writes."""

    given: Tensor
    results: Sequence[Tensor]
    replay: Callable[[], None]


class Pool:
    """The memory that the graphs of one pipeline's parts share, of which one runs at a time."""

    def __init__(self, device: torch.device):
        self.device, self.lock = device, threading.Lock()
        self.handle = torch.cuda.graph_pool_handle()


def capture_parts(
    model: Model, adapters: Mapping[str, Adapter], device: torch.device
) -> tuple[Model, dict[str, Adapter]]:
    """Return a model and its T2I-Adapters, by name, whose text encoders and adapters are graphs on a CUDA device.

    A text encoder that is elsewhere stays as it is.
    """
    pool = Pool(device)
    encoders = tuple(
        CapturedTextEncoder(encoder, pool) if encoder.device == device else encoder
        for encoder in model.text_encoders
    )
    made = {id(adapter): CapturedAdapter(adapter, pool) for adapter in adapters.values()}
    return replace(model, text_encoders=encoders), {name: made[id(own)] for name, own in adapters.items()}


class Captured:
    """A function of one tensor, as a graph for each of the last SIZES sizes it was called with.

    What a call returns is the caller's own. Safe from several threads. Where the function cannot be captured, it is
    called as it is, after one warning (UserWarning). What it raises by itself is raised, and its graphs stay.
    """

    def __init__(self, name: str, function: Callable[[Tensor], Sequence[Tensor]], pool: Pool):
        self.name, self.function, self.pool = name, function, pool
        self._recorded: OrderedDict[tuple, Recorded] | None = OrderedDict()  # None: it cannot be captured

    def __call__(self, given: Tensor) -> Sequence[Tensor]:
        with self.pool.lock:
            recorded = self._of_size(given)
            if recorded is not None:
                recorded.given.copy_(given)
                recorded.replay()
                return copied(recorded.results)
        return self.function(given)

    def _of_size(self, given: Tensor) -> Recorded | None:
        if self._recorded is None:
            return None
        key = (*given.shape, given.dtype)
        if key not in self._recorded:
            own, results = self._called(given)
            while len(self._recorded) >= SIZES:
                self._recorded.popitem(last=False)
            try:
                self._recorded[key] = self._record(own, results)
            except RuntimeError as error:  # CUDA's, whatever the module does that a graph cannot
                self._recorded = None
                said = f"cuda graph: {self.name} cannot be captured, and runs as it is: {first_line(error)}"
                warnings.warn(said, stacklevel=3)
                return None
        self._recorded.move_to_end(key)
        return self._recorded[key]

    def _called(self, given: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return a graph's own tensors, which a call without one has filled."""
        with torch.inference_mode(False):  # they are used in and outside of it
            own = torch.empty_like(given, device=self.pool.device).copy_(given)
        with torch.inference_mode():
            return own, copied(self.function(own))

    def _record(self, own: Tensor, results: Sequence[Tensor]) -> Recorded:
        if any(result.device != own.device for result in results):  # its work would not be in the graph
            raise RuntimeError(f"its results are not on {own.device}")

        @torch.inference_mode()
        def run() -> None:
            torch._foreach_copy_(results, list(self.function(own)))

        return Recorded(own, results, captured(run, self.pool.device, self.pool.handle))


def copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies, made by as few launches as there are dtypes."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


class CapturedTextEncoder:
    """A text encoder, called as transformers' CLIP models are: token ids (B, S)."""

    def __init__(self, encoder: CLIPTextModel, pool: Pool):
        self.device = encoder.device
        self._run = Captured("a text encoder", partial(_encode, encoder), pool)

    def __call__(self, ids: Tensor, output_hidden_states: bool = True) -> CLIPTextModelOutput:
        """Return the first output, which is the pooled embedding (B, P) of an encoder that has one, and all states."""
        first, *states = self._run(ids)
        return CLIPTextModelOutput(text_embeds=first, hidden_states=tuple(states))


def _encode(encoder: CLIPTextModel, ids: Tensor) -> list[Tensor]:
    output = encoder(ids, output_hidden_states=True)
    return [output[0], *output.hidden_states]


class CapturedAdapter:
    """A T2I-Adapter, called as diffusers' is."""

    def __init__(self, adapter: Adapter, pool: Pool):
        self.config = adapter.config
        self._run = Captured("an adapter", adapter, pool)

    def __call__(self, condition: Tensor) -> Sequence[Tensor]:
        """Return the feature maps (1, C_l, h_l, w_l) of a condition (1, C, H, W)."""
        return self._run(condition)
