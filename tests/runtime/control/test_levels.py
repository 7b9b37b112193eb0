"""Sizes of pictures."""

import numpy as np
import pytest

from runtime.control.levels import level_sizes, picture_side
from runtime.errors import InputError


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (1000, "height 1000: not a multiple of 16; the nearest: 992 and 1008"),
        (7, "height 7: not a multiple of 16; the nearest: 16"),
        (0, "height 0: expected pixels, a positive multiple of 16"),
        (-64, "height -64: expected pixels, a positive multiple of 16"),
        (64.0, "height 64.0: expected pixels, a positive multiple of 16"),
        (True, "height True"),
        (None, "height None: expected pixels, a positive multiple of 16"),
        (2**14 + 16, "expected at most 16384 pixels"),
    ],
)
def test_sizes_name_the_nearest_that_fit(side, expected):
    with pytest.raises(InputError) as caught:
        picture_side(side, "height")
    assert expected in str(caught.value)


def test_sizes_of_any_integer_type_pass():
    assert picture_side(np.int64(64), "height") == 64


def test_deeper_levels_round_up():
    assert level_sizes(1040, 64) == [(65, 4), (65, 4), (33, 2), (33, 2)]
