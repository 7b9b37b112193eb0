"""Whether words of a region act inside its mask and nowhere else: a colour asked for in one half of the picture."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Words for the picture and for one half of it; plain: all of it in one prompt, which cannot say where."""

    prompt: str
    words: str
    plain: str
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
        yield Asked(f"{beside} {where}", f"{thing} {where}", f"{thing} and {beside} {where}", own, i % 2 == 0)


def words_scores(pipe: LocalControlPipeline, count: int = 200) -> dict[str, WordsScore]:
    """Return the score of regions' words, and of the same words in one prompt, over `count` pictures each."""
    found: dict[str, list[tuple[bool, bool]]] = {"plain prompt": [], "words of the region": []}
    for i, wanted in enumerate(asked(count)):
        first = 0 if wanted.left else SIZE // 2
        mask = box(SIZE, SIZE, (first, 0, first + SIZE // 2, SIZE))
        region = Region(prompt=wanted.words, mask=mask)
        for name, arguments in zip(found, ((wanted.plain,), (wanted.prompt, [region])), strict=True):
            shown = colour_map(np.asarray(pipe(*arguments, seed=i).images[0])) == NAMES.index(wanted.colour)
            inside, outside = (shown[mask[0, 0].numpy() == value].sum() / shown.size for value in (1, 0))
            found[name].append((inside >= COLOUR_SHARE, outside < COLOUR_SHARE))
    return {name: _score(np.array(rows)) for name, rows in found.items()}


def _score(rows: np.ndarray) -> WordsScore:
    return WordsScore(*rows.mean(0).tolist(), float(rows.all(1).mean()))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
