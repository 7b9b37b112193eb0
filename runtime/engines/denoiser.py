"""The denoiser on an engine: see `runtime.sampling.denoiser`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from kernels.ops import inject
from runtime.control.features import Control
from runtime.control.residuals import Residuals
from runtime.control.rows import over_rows
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
from runtime.model.blocks import Injection
from runtime.model.unet import UNet
from runtime.sampling.controlnets import ControlNets
from runtime.sampling.denoiser import segments_of
from runtime.sampling.rows import repeat_rows
from runtime.sampling.torch_step import Joint, Part, Step

NONE = torch.zeros(())


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


class EngineStep:
    """What of one request is the same at every step, as an engine's inputs, and a step of it by itself.

    time (T, rows, sum of C) and constant (rows, ...): see `constant_inputs`; of guidance the unguided rows first, so
    that without it the last ones count. texts: how many there are, where regions have words, and of how many tokens.
    """

    def __init__(
        self,
        denoiser: EngineDenoiser,
        engines: tuple[Engine, Engine],
        time: Tensor,
        constant: Mapping[str, Tensor],
        texts: Sequence[int],
        control: Control | None,
        words: Words | None,
        nets: ControlNets | None,
    ):
        """engines: of a step without what ControlNets add, and with it."""
        self.denoiser, self.engines, self.time, self.constant, self.texts = (
            denoiser,
            engines,
            time,
            constant,
            texts,
        )
        self.control, self.words, self.nets = control, words, nets
        self.segments = segments_of(len(time), control, words)

    def __call__(self, sample: Tensor, index: int) -> Tensor:
        """See `torch_step.Step`."""
        return self.denoiser.together([Part(self, sample, index)])[0]

    def fill(self, inputs: Mapping[str, Tensor], part: Part, place: slice, left: Slot | None) -> Slot:
        """Write a part's inputs into its rows of an engine's, but for those of ControlNets.

        left: what these rows were filled for before; the constants and the control of the same are not written again.
        """
        rows, index = len(part.sample), part.index
        slot = Slot(ref(self), rows, self.segments[index])
        if left is None or left[:2] != slot[:2]:
            left = None
            for name, tensor in self.constant.items():
                inputs[name][place].copy_(tensor[-rows:])
        if left != slot:
            levels = None if self.control is None else self.control.gated(index, rows)
            for i, name in enumerate(self.denoiser.levels):
                inputs[name][place].copy_(NONE if levels is None else over_rows(levels[i], rows))
            for name in (name for name in inputs if name.startswith(SHARES)):
                fill_shares(inputs[name][place], self.words, index)
        inputs[SAMPLE][place].copy_(part.sample)
        inputs[TIME][place].copy_(self.time[index, -rows:])
        return slot


class Slot(NamedTuple):
    """Whose rows of a binding, how many, and of which segment of the steps. Weak: what has ended is not kept for it."""

    step: ref[EngineStep]
    rows: int
    segment: int


Joined = tuple[Part, "list[Injection] | None"]  # a part, and what its ControlNets add


class EngineDenoiser:
    """SDXL's UNet as a compiled engine: one call a step, its inputs filled in place."""

    whole_steps = "a compiled UNet"

    def __init__(self, engine: Engine, unet: UNet, variants: Mapping[Taken, Engine] | None = None):
        """unet: only its `once_per_image` parameters are used, in torch; the engine has the others.

        variants: engines for pictures whose regions have words, ControlNets, or both; `engine` otherwise.
        """
        self.engine, self.unet, self.device = engine, unet, engine.device
        self.variants = variants or {}
        self.dtype, self.profile = unet.conv_in.weight.dtype, engine.profile
        self._ports = {port.name: port for port in engine.spec.inputs}
        self._tokens = self._ports[numbered(KEY, 0)].shape[-2]
        self.levels = [name for name in self._ports if name.startswith(LEVEL)]

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
        return tuple(self._ports[name].shape[1] for name in self.levels)

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
        engines = tuple(
            self.variants.get(Taken(words is not None, nets), self.engine) for nets in (False, True)
        )
        nets, ports = None, engines[0].spec.inputs
        if any(port.name.startswith(SHARES) for port in ports):
            most = most_words(ports)
            words = words or Words.none(len(timesteps))
            text = words.beside(text, None if most is None else most + 1)
        if residuals is not None:
            nets = ControlNets(residuals, timesteps, text, pooled, time_ids, repeat, words)
        time, constant = constant_inputs(self.unet, timesteps, text, pooled, time_ids)
        time = repeat_rows(time, repeat, dim=1)
        constant = {name: repeat_rows(tensor, repeat) for name, tensor in constant.items()}
        return EngineStep(self, engines, time, constant, text.shape[1:-1], control, words, nets)

    def joint(self) -> Joint:
        """See `Denoiser.joint`: what the rows of a binding were filled for is kept with it."""
        return self.together

    def together(self, parts: Sequence[Part]) -> list[Tensor]:
        """Return the predictions of several requests' steps, each (rows, C, h, w), in as few calls as fit."""
        groups: dict[tuple, list[Joined]] = {}
        for part in parts:
            nets = part.step.nets
            added = None if nets is None else nets(part.sample.to(self.dtype), part.index)
            key = part.step.engines[added is not None], part.step.texts, part.sample.shape[1:]
            groups.setdefault(key, []).append((part, added))
        found: dict[int, Tensor] = {}
        for (engine, *_), joined in groups.items():
            for some in _fitting(joined, engine.profile.range("rows")[2]):
                outputs = self._run(engine, some)
                found |= {id(part): output for (part, _), output in zip(some, outputs, strict=True)}
        return [found[id(part)] for part in parts]

    def _run(self, engine: Engine, joined: Sequence[Joined]) -> Sequence[Tensor]:
        rows, first = [len(part.sample) for part, _ in joined], joined[0][0]
        with engine.lock:
            bound = self._bind(engine, first, sum(rows) if len(rows) == 1 else engine.rows_for(sum(rows)))
            left, bound.owner = bound.owner or {}, None  # nobody's, should the filling fail
            slots, start = {}, 0
            for (part, added), n in zip(joined, rows, strict=True):
                place = slice(start, start + n)
                slots[start] = part.step.fill(bound.inputs, part, place, left.get(start))
                for i, injection in enumerate(added or ()):
                    residual = bound.inputs[numbered(RESIDUAL, i)][place]
                    inject(residual.zero_(), *injection, inplace=True)
                start += n
            bound.owner = slots
            bound.run()
            prediction = bound.outputs[PREDICTION].clone()  # the next step writes the same memory
        return prediction[:start].split(rows)

    def _bind(self, engine: Engine, part: Part, rows: int) -> Binding:
        """Return the engine's tensors for so many rows of latents and texts like a part's."""
        divisor = self._ports[SAMPLE].shape[2].divisor
        height, width = part.sample.shape[2:]
        sizes = {"rows": rows, "height": height * divisor, "width": width * divisor}
        key = next(port for port in engine.spec.inputs if port.name == numbered(KEY, 0))
        axes = {axis.name for axis in key.shape if isinstance(axis, Axis)}
        given = dict(zip(("tokens", "texts"), reversed(part.step.texts), strict=False))
        return engine.bind(**sizes, **{name: n for name, n in given.items() if name in axes})


def _fitting(joined: Sequence[Joined], most: int) -> Iterator[list[Joined]]:
    """Yield the parts in groups of at most `most` rows, in their order; of more than that by themselves."""
    group: list[Joined] = []
    for item in joined:
        if group and sum(len(part.sample) for part, _ in [*group, item]) > most:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def fill_shares(shares: Tensor, words: Words, step: int) -> None:
    """Write the shares of one step into an engine's input (rows, texts, h, w), 0 for texts that are not there."""
    rows, _, height, width = shares.shape
    shares.zero_()
    shares[:, : words.texts].copy_(words.shares(step, height, width, rows, shares.device, shares.dtype))
