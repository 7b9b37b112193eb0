"""The denoiser on an engine: see `runtime.sampling.denoiser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.ops import inject
from runtime.control.features import Control
from runtime.control.residuals import Residuals
from runtime.control.words import Words
from runtime.engines.base import Binding, Engine
from runtime.engines.ports import (
    KEY,
    LEVEL,
    PREDICTION,
    RESIDUAL,
    SAMPLE,
    SHARES,
    TIME,
    VALUE,
    Axis,
    most_words,
    numbered,
)
from runtime.engines.unet_graph import Taken
from runtime.model.unet import UNet
from runtime.sampling.controlnets import ControlNets
from runtime.sampling.denoiser import segments_of
from runtime.sampling.rows import repeat_rows
from runtime.sampling.torch_step import Part, Step


def constant_inputs(
    unet: UNet, timesteps: Tensor, text: Tensor, pooled: Tensor, time_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what a compiled UNet takes that is known before the first step.

    Returns the time projections of all resnets side by side, (T, P, sum of C), of which a step takes one row, and the
    keys and values of every cross-attention by the names of their inputs. Arguments: see `Denoiser.prepare`.
    """
    time = torch.cat(unet.embed_time(timesteps, pooled, time_ids), dim=-1)
    pairs = unet.project_text(text.to(unet.conv_in.weight.dtype))
    return time, {
        numbered(kind, i): x
        for i, pair in enumerate(pairs)
        for kind, x in zip((KEY, VALUE), pair, strict=True)
    }


class EngineDenoiser:
    """SDXL's UNet as a compiled engine: one call a step, its inputs filled in place."""

    whole_steps = "a compiled UNet"
    halves = False

    def __init__(self, engine: Engine, unet: UNet, variants: Mapping[Taken, Engine] | None = None):
        """unet: only its `once_per_image` parameters are used, in torch; the engine has the others.

        variants: engines for pictures whose regions have words, ControlNets, or both; `engine` otherwise.
        """
        self.engine, self.unet, self.device = engine, unet, engine.device
        self.variants = variants or {}
        self.dtype, self.profile = unet.conv_in.weight.dtype, engine.profile
        self._ports = {port.name: port for port in engine.spec.inputs}
        self._tokens = self._ports[numbered(KEY, 0)].shape[-2]
        self._levels = [name for name in self._ports if name.startswith(LEVEL)]

    @property
    def latent_channels(self) -> int:
        return self._ports[SAMPLE].shape[1]

    @property
    def most_tokens(self) -> int | None:
        """Return how many tokens of a prompt it takes; None for any number."""
        return self._tokens if isinstance(self._tokens, int) else None

    @property
    def most_words(self) -> int | None:
        """Return how many regions' words it takes; None for any number."""
        return most_words(self.variants.get(Taken(words=True), self.engine).spec.inputs)

    @property
    def control_channels(self) -> Sequence[int]:
        return tuple(self._ports[name].shape[1] for name in self._levels)

    def prepare(
        self,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        control: Control | None,
        repeat: int,
        cache_interval: int = 1,
        words: Words | None = None,
        residuals: Residuals | None = None,
    ) -> Step:
        """See `Denoiser.prepare`; cache_interval is 1."""
        plain, with_nets = (
            self.variants.get(Taken(words is not None, nets), self.engine) for nets in (False, True)
        )
        engine, nets = plain, None
        shares = {port.name: port for port in engine.spec.inputs if port.name.startswith(SHARES)}
        if shares:
            most = most_words(engine.spec.inputs)
            words = words or Words.none(len(timesteps))
            text = words.beside(text, None if most is None else most + 1)
        if residuals is not None:
            nets = ControlNets(residuals, timesteps, text, pooled, time_ids, repeat, words)
        time, constant = constant_inputs(self.unet, timesteps, text, pooled, time_ids)
        time = repeat_rows(time, repeat, dim=1)
        constant = {name: repeat_rows(tensor, repeat) for name, tensor in constant.items()}
        segments = segments_of(len(timesteps), control, words)
        run = object()  # of which (run, segment) an owned binding holds the constants and the control

        def fill(bound: Binding, rows: int, index: int) -> None:
            owner, segment = bound.owner or (None, None)
            if owner is not run:  # the first step, or another run came in between
                for name, tensor in constant.items():
                    bound.inputs[name].copy_(tensor[-rows:])
            if owner is not run or segment != segments[index]:
                levels = [torch.zeros(())] * len(self._levels) if control is None else control.gated(index)
                for name, level in zip(self._levels, levels, strict=True):
                    bound.inputs[name].copy_(level)
                for name in shares:
                    fill_shares(bound.inputs[name], words, index)
            bound.owner = run, segments[index]

        def step(sample: Tensor, index: int) -> Tensor:
            added = None if nets is None else nets(sample.to(self.dtype), index)
            engine = plain if added is None else with_nets
            with engine.lock:
                bound, rows = self._bind(engine, sample, text), len(sample)
                fill(bound, rows, index)
                for i, level in enumerate(added or ()):
                    inject(bound.inputs[numbered(RESIDUAL, i)].zero_(), *level, inplace=True)
                bound.inputs[SAMPLE].copy_(sample)
                bound.inputs[TIME].copy_(time[index, -rows:])
                bound.run()
                return bound.outputs[PREDICTION].clone()  # the next step writes the same memory

        return step

    def together(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Denoiser.together`: one by one."""
        return [part.step(part.sample, part.index) for part in parts]

    def _bind(self, engine: Engine, sample: Tensor, text: Tensor) -> Binding:
        """Return the engine's tensors for latents of this shape and prompts (..., texts, tokens, D)."""
        divisor = self._ports[SAMPLE].shape[2].divisor
        rows, _, height, width = sample.shape
        sizes = {"rows": rows, "height": height * divisor, "width": width * divisor}
        key = next(port for port in engine.spec.inputs if port.name == numbered(KEY, 0))
        axes = {axis.name for axis in key.shape if isinstance(axis, Axis)}
        sizes |= {
            name: n for name, n in (("tokens", text.shape[-2]), ("texts", text.shape[-3])) if name in axes
        }
        return engine.bind(**sizes)


def fill_shares(shares: Tensor, words: Words, step: int) -> None:
    """Write the shares of one step into an engine's input (rows, texts, h, w), 0 for texts that are not there."""
    rows, _, height, width = shares.shape
    shares.zero_()
    shares[:, : words.texts].copy_(words.shares(step, height, width, rows, shares.device, shares.dtype))
