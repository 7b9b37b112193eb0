"""A request's steps on the UNet in PyTorch: by itself, or with the rows of others in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.ops import inject
from runtime.control.features import Control
from runtime.control.rows import channels_last, over_rows
from runtime.control.words import Words
from runtime.model.blocks import Injection, KeyValue, SharedText
from runtime.model.unet import UNet
from runtime.sampling.controlnets import ControlNets
from runtime.sampling.deep_cache import DeepCache
from runtime.sampling.rows import of_words
from runtime.text.prompts import MOST_CHUNKS

# (sample (G*B, C, h, w), index of the step) -> prediction (G*B, C, h, w) float32; with B rows, those of the last B
Step = Callable[[Tensor, int], Tensor]


class Part(NamedTuple):
    """One request's share of a call: its `Step`, the sample (rows, C, h, w), and the index of its step."""

    step: Step
    sample: Tensor
    index: int


Joint = Callable[[Sequence[Part]], list[Tensor]]  # see `denoiser.Denoiser.joint`


class TorchStep:
    """What of one request is the same at every step, and a step of it.

    time: each resnet's projections, (T, rows, C). text: each cross-attention's keys and values, (rows, ...); of
    guidance the unguided rows first, so that without it the last ones count.
    """

    def __init__(
        self,
        unet: UNet,
        time: Sequence[Tensor],
        text: Sequence[KeyValue],
        control: Control | None,
        words: Words | None,
        nets: ControlNets | None,
        cache: DeepCache,
    ):
        self.time, self.text, self.control, self.words, self.nets, self.cache = (
            time,
            text,
            control,
            words,
            nets,
            cache,
        )
        self.levels, weight = unet.text_levels(), unet.conv_in.weight
        self.dtype, self.one = weight.dtype, torch.ones(1, device=time[0].device)

    def __call__(self, sample: Tensor, index: int) -> Tensor:
        """See `Step`."""
        sample, rows = sample.to(self.dtype), len(sample)
        gated = [] if self.control is None else self.control.gated(index, rows)
        levels = [Injection([level], None, self.one) for level in gated] or None
        return self.cache(
            index, sample, self.times(index, rows), self.texts(sample, index), levels, self.nets
        ).float()

    def times(self, index: int, rows: int) -> list[Tensor]:
        """Return each resnet's time projection at a step, (rows, C)."""
        return [t[index, -rows:] for t in self.time]

    def texts(self, sample: Tensor, index: int) -> list[KeyValue | SharedText]:
        """Return each cross-attention's keys and values at a step."""
        own = [(k[-len(sample) :], v[-len(sample) :]) for k, v in self.text]
        return of_words(own, self.words, index, sample, self.levels)


KEPT = 8  # texts and controls of several sizes
MOST_TOKENS = 77 * MOST_CHUNKS  # that texts of a call are repeated to


class TorchJoint:
    """Steps of several requests of latents of one size in one call of the UNet.

    Steps that may take deep features from another one are computed by themselves, and so is a part alone, and one whose
    text has no length in common with the others', see `_groups`. The texts and the control of all rows are put together
    once for as long as the same requests share the calls.
    """

    def __init__(self, unet: UNet):
        self.unet = unet
        self._kept: dict[tuple, tuple[tuple, object]] = {}

    def __call__(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Joint`."""
        found: dict[int, Tensor] = {}
        for number, group in enumerate(_groups([part for part in parts if part.step.cache.interval == 1])):
            if len(group) > 1:
                found |= zip(map(id, group), self._run(group, number), strict=True)
        return [found[id(p)] if id(p) in found else p.step(p.sample, p.index) for p in parts]

    def _run(self, parts: Sequence[Part], group: int) -> list[Tensor]:
        rows = [len(part.sample) for part in parts]
        sample = torch.cat([part.sample for part in parts]).to(self.unet.conv_in.weight.dtype)
        times = [part.step.times(part.index, n) for part, n in zip(parts, rows, strict=True)]
        time = [torch.cat(layer) for layer in zip(*times, strict=True)]
        text = self._same(("text", group), parts, "words", lambda: _texts(parts, sample.dtype))
        control = self._same(("control", group), parts, "control", lambda: _control(parts, rows))
        prediction = self.unet(sample, time, text, control, _residuals(parts, rows)).float()
        return list(prediction.split(rows))

    def _same(self, name: tuple[str, int], parts: Sequence[Part], varies: str, make: Callable[[], object]):
        """Return what `make` gives, as it was for as long as parts, rows and segments of `varies` are the same."""
        changing = [getattr(part.step, varies) for part in parts]
        segments = [None if c is None else c.segments[p.index] for c, p in zip(changing, parts, strict=True)]
        key = tuple((p.step, len(p.sample), s) for p, s in zip(parts, segments, strict=True))
        place = name, tuple(parts[0].sample.shape[2:])  # other sizes have calls of their own
        if place not in self._kept or self._kept[place][0] != key:
            self._kept.pop(place, None)  # before what replaces it is made
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[place] = key, make()
        return self._kept[place][1]


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Return parts whose texts are repeated to one length, which is at most MOST_TOKENS, or that of one of them.

    Of texts of 5, 7, 8 and 9 chunks it would be 2520 chunks, and the keys and values of SDXL's layers terabytes.
    """
    groups: list[tuple[int, list[Part]]] = []
    for part in parts:
        own = part.step.text[0][0].shape[-2]
        for number, (length, group) in enumerate(groups):
            both = math.lcm(length, own)
            if both <= max(MOST_TOKENS, length, own):
                groups[number] = both, [*group, part]
                break
        else:
            groups.append((own, [part]))
    return [group for _, group in groups]


def _texts(parts: Sequence[Part], dtype: torch.dtype) -> list[KeyValue | SharedText]:
    """Return the keys and values of all parts' rows: texts as long as the longest, as many as of the most.

    A shorter one is repeated, see `Words.beside`; one that a part does not have has no share.
    """
    given = [part.step.texts(part.sample.to(dtype), part.index) for part in parts]
    most = max(found[0][0].shape[1] if len(found[0]) == 3 else 1 for found in given)
    length = math.lcm(*(found[0][0].shape[-2] for found in given))
    if most == 1 and all(len(found[0]) == 2 for found in given):
        return [
            tuple(torch.cat([_repeated(x, length) for x in side]) for side in zip(*layer, strict=True))
            for layer in zip(*given, strict=True)
        ]
    found = []
    for level, layer in zip(parts[0].step.levels, zip(*given, strict=True), strict=True):
        size = tuple(-(-side // 2**level) for side in parts[0].sample.shape[2:])
        shared = [_shared(own, size, most, length) for own in layer]
        found.append(tuple(torch.cat(side) for side in zip(*shared, strict=True)))
    return found


def _repeated(x: Tensor, length: int) -> Tensor:
    """Return keys or values (..., S, C) repeated to `length` tokens."""
    return x if x.shape[-2] == length else x.repeat(*[1] * (x.ndim - 2), length // x.shape[-2], 1)


def _shared(own: KeyValue | SharedText, size: tuple[int, int], most: int, length: int) -> SharedText:
    """Return a part's keys, values and shares with `most` texts of `length` tokens; size: of the map attended to."""
    if len(own) == 2:
        key, value = (x[:, None] for x in own)
        shares = key.new_ones(len(key), 1, *size)
    else:
        key, value, shares = own
    missing = most - key.shape[1]
    key, value = (_padded(_repeated(x, length), missing) for x in (key, value))
    return key, value, _padded(shares, missing)


def _padded(x: Tensor, missing: int) -> Tensor:
    """Return (rows, P, ...) with `missing` texts of zeros more."""
    return x if missing == 0 else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1)


def _control(parts: Sequence[Part], rows: Sequence[int]) -> list[Injection] | None:
    """Return the gated features of all parts' rows; None where no part has any."""
    gated = [
        None if part.step.control is None else part.step.control.gated(part.index, n)
        for part, n in zip(parts, rows, strict=True)
    ]
    first = next((levels for levels in gated if levels is not None), None)
    if first is None:
        return None
    found = [[f.new_zeros(1, *f.shape[1:]) for f in first] if levels is None else levels for levels in gated]
    return [Injection([_rows(level, rows)], None, parts[0].step.one) for level in zip(*found, strict=True)]


def _residuals(parts: Sequence[Part], rows: Sequence[int]) -> list[Injection] | None:
    """Return what ControlNets add for all parts' rows; None where none acts. Each part's run by themselves."""
    dtypes = [part.step.dtype for part in parts]
    given = [
        None if p.step.nets is None else p.step.nets(p.sample.to(dtype), p.index)
        for p, dtype in zip(parts, dtypes, strict=True)
    ]
    first = next((places for places in given if places is not None), None)
    if first is None:
        return None
    found = []
    for place, injection in enumerate(first):
        shape = injection.features[0].shape[1:]
        sums = []
        for places, n in zip(given, rows, strict=True):
            zeros = injection.features[0].new_zeros(n, *shape).contiguous(memory_format=torch.channels_last)
            sums.append(zeros if places is None else inject(zeros, *places[place], inplace=True))
        found.append(Injection([torch.cat(sums)], None, parts[0].step.one))
    return found


def _rows(features: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Return a map for every row, of maps (B, C, h, w) for each part, whose row i has map i % B."""
    return channels_last(torch.cat([over_rows(f, n) for f, n in zip(features, rows, strict=True)]))
