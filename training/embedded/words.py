"""Whether words of a region act inside its mask and nowhere else: a colour asked for in one half of the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.control.masks import box
from runtime.control.region import Region
from runtime.pipeline import LocalControlPipeline
from training.embedded.evaluate import COLOUR_SHARE, NAMES, colour_map
from training.embedded.vae import SIZE
from training.embedded.world import BACKGROUNDS, COLOURS, SHAPES


@dataclass(frozen=True)
class WordsScore:
    """Shares of pictures: that show the region's colour inside its mask, that do not outside, and both at once."""

    inside: float
    kept_out: float
    local: float


@dataclass(frozen=True)
class Asked:
    """Two things: whole names both, and cannot say where; words are of the one in the left or right half, others of
    the one in the other. colour: the first one's.
    """

    whole: str
    words: str
    others: str
    colour: str
    left: bool


def asked(count: int) -> Iterator[Asked]:
    """Yield prompts of two things of two colours, the same for every model."""
    for i in range(count):
        random = np.random.default_rng([8, i])
        own, other = random.permutation(list(COLOURS))[:2]
        shape, others = random.permutation(list(SHAPES))[:2]
        where = BACKGROUNDS[random.choice(list(BACKGROUNDS))][0]
        thing, beside = f"{_article(own)} {own} {shape}", f"{_article(other)} {other} {others}"
        yield Asked(
            f"{thing} and {beside} {where}", f"{thing} {where}", f"{beside} {where}", str(own), i % 2 == 0
        )


WAYS = ("one prompt", "and words for each half", "words for one half, the prompt for the other")


def words_scores(
    pipe: LocalControlPipeline, count: int = 200, ways: Sequence[str] = WAYS
) -> dict[str, WordsScore]:
    """Return the scores of `count` pictures each: of one prompt for both things, of the same with regions' words for
    each half, and of words in one half only of a picture whose prompt names the other thing."""
    found: dict[str, list[tuple[bool, bool]]] = {way: [] for way in ways}
    for i, wanted in enumerate(asked(count)):
        first = 0 if wanted.left else SIZE // 2
        mask = box(SIZE, SIZE, (first, 0, first + SIZE // 2, SIZE))
        here, there = Region(prompt=wanted.words, mask=mask), Region(prompt=wanted.others, mask=1 - mask)
        calls = ((wanted.whole,), (wanted.whole, [here, there]), (wanted.others, [here]))
        for way in ways:
            image = np.asarray(pipe(*calls[WAYS.index(way)], seed=i).images[0])
            shown = colour_map(image) == NAMES.index(wanted.colour)
            inside, outside = (shown[mask[0, 0].numpy() == value].sum() / shown.size for value in (1, 0))
            found[way].append((inside >= COLOUR_SHARE, outside < COLOUR_SHARE))
    return {way: _score(np.array(rows)) for way, rows in found.items()}


def _score(rows: np.ndarray) -> WordsScore:
    return WordsScore(*rows.mean(0).tolist(), float(rows.all(1).mean()))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
