"""training.embedded.words: what counts as words that are local."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from training.embedded.words import asked, words_scores
from training.embedded.world import COLOURS


def test_each_prompt_asks_for_two_things_of_two_colours():
    found = list(asked(40))
    for one in found:
        assert one.colour in one.words and one.colour not in one.prompt
        assert one.plain.startswith(one.words.split(" on ")[0].split(" in ")[0].split(" at ")[0])
    assert sum(one.left for one in found) == 20 and len({one.colour for one in found}) > 4
    assert found[:5] == list(asked(5))


def test_scores_tell_where_the_colour_is():
    wanted = {one.prompt: one for one in asked(4)} | {one.plain: one for one in asked(4)}

    def draw(prompt, regions=(), seed=0):
        """Show the colour where it is asked for with a region, and on the other side too without."""
        one = wanted[prompt]
        pixels = np.full((128, 128, 3), (240, 244, 249), np.uint8)
        left, right = pixels[40:80, 10:50], pixels[40:80, 74:114]
        for side, shown in ((left, one.left or not regions), (right, not one.left or not regions)):
            if shown:
                side[:] = COLOURS[one.colour]
        return SimpleNamespace(images=[Image.fromarray(pixels)])

    found = words_scores(draw, 4)
    assert vars(found["words of the region"]) == {"inside": 1, "kept_out": 1, "local": 1}
    assert vars(found["plain prompt"]) == {"inside": 1, "kept_out": 0, "local": 0}
