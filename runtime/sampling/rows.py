"""The rows of a guidance batch: each prompt's for all of its pictures, and each text's share at every step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from runtime.control.words import Words
from runtime.model.blocks import KeyValue, SharedText


def repeat_rows(tensor: Tensor, times: int, dim: int = 0) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=dim)


def of_words(
    text: Sequence[KeyValue], words: Words | None, step: int, sample: Tensor, levels: Sequence[int]
) -> list[KeyValue | SharedText]:
    """Return keys and values, where regions have words with the shares of their texts in one step.

    levels: of each of them, see `Encoder.text_levels`.
    """
    if words is None:
        return list(text)
    sizes = {level: tuple(-(-side // 2**level) for side in sample.shape[2:]) for level in set(levels)}
    shares = {
        level: words.shares(step, *size, len(sample), sample.device, sample.dtype)
        for level, size in sizes.items()
    }
    return [(*pair, shares[level]) for pair, level in zip(text, levels, strict=True)]
