"""training.embedded.words: what counts as words that are local."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from training.embedded.words import WAYS, asked, words_scores
from training.embedded.world import COLOURS


def test_each_prompt_asks_for_two_things_of_two_colours():
    found = list(asked(40))
    for one in found:
        assert one.colour in one.words and one.colour in one.whole and one.colour not in one.others
    assert sum(one.left for one in found) == 20 and len({one.colour for one in found}) > 4
    assert found[:5] == list(asked(5))


def test_scores_tell_where_the_colour_is():
    def draw(prompt, regions=(), seed=0):
        """Show the colour where it is asked for with a region, and on the other side too without."""
        one = list(asked(4))[seed]
        assert prompt == (one.others if len(regions) == 1 else one.whole)
        pixels = np.full((128, 128, 3), (240, 244, 249), np.uint8)
        left, right = pixels[40:80, 10:50], pixels[40:80, 74:114]
        for side, shown in ((left, one.left or not regions), (right, not one.left or not regions)):
            if shown:
                side[:] = COLOURS[one.colour]
        return SimpleNamespace(images=[Image.fromarray(pixels)])

    found = words_scores(draw, 4)
    assert [vars(found[way]) for way in WAYS[1:]] == [{"inside": 1, "kept_out": 1, "local": 1}] * 2
    assert vars(found[WAYS[0]]) == {"inside": 1, "kept_out": 0, "local": 0}
