"""runtime.control.keyframes: numbers that change over the steps."""

import numpy as np
import pytest
import torch

from runtime.control.keyframes import MOST, over_steps, read_keyframes, written
from runtime.errors import InputError


@pytest.mark.parametrize("value", [0.5, 1, "0.5", " -2 ", np.float32(0.5), torch.tensor(0.5)])
def test_a_number_is_a_number(value):
    found = read_keyframes(value, "scale")
    assert found == float(value) and isinstance(found, float)
    assert over_steps(found, 3) == [found] * 3


@pytest.mark.parametrize(
    "value",
    [
        "0:1.0,0.5:0.3",
        " 0 : 1 , 0.5 : 0.3 ",
        {0: 1.0, 0.5: 0.3},
        {"0": "1", "0.5": "0.3"},
        [(0, 1), (0.5, 0.3)],
        [["0", 1], [0.5, "0.3"]],
    ],
)
def test_keyframes_in_all_spellings(value):
    assert read_keyframes(value, "scale") == ((0.0, 1.0), (0.5, 0.3))


def test_between_keyframes_it_is_interpolated():
    assert over_steps(((0.0, 1.0), (0.5, 0.0)), 4) == [1, 0.5, 0, 0]
    assert over_steps(((0.25, 2.0), (0.75, -2.0)), 8) == [2, 2, 2, 1, 0, -1, -2, -2]
    assert over_steps(((0.5, 3.0),), 4) == [3] * 4
    assert over_steps(((0.0, 1.0), (1.0, 0.0)), 1) == [1]


def test_it_is_written_as_it_is_given():
    for text in ("0.5", "0:1,0.5:0.3"):
        assert written(read_keyframes(text, "scale")) == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("often", "scale 'often'; expected a finite number"),
        (True, "scale True; expected a finite number"),
        (float("nan"), "scale nan; expected a finite number"),
        ("0:1,0.5", "scale '0:1,0.5'; expected a number, or keyframes such as 0:1.0,0.5:0.3"),
        ("0:1:2", "scale '0:1:2'; expected a number, or keyframes"),
        ("0:often", "scale '0:often'; expected a number, or keyframes"),
        ("0:nan", "scale '0:nan'; expected a number, or keyframes"),
        (["01", "12"], r"scale \['01', '12'\]; expected a number, or keyframes"),
        (1e7, "scale 10000000.0; expected a number between -1e.06 and 1e.06"),
        ("0:1e300", "scale '0:1e300'; expected a number, or keyframes"),
        ([1, 2], r"scale \[1, 2\]; expected a number, or keyframes"),
        (
            "0:1,1.5:0",
            "scale '0:1,1.5:0'; expected fractions of the steps from 0 to 1, each after the one before",
        ),
        ("-0.1:1", "scale '-0.1:1'; expected fractions"),
        ("0.5:1,0.5:0", "scale '0.5:1,0.5:0'; expected fractions"),
        ("0.5:1,0.2:0", "scale '0.5:1,0.2:0'; expected fractions"),
        ([], "scale has 0 keyframes; expected 1 to 100"),
        ({}, "scale has 0 keyframes"),
        ([(i / 200, 1) for i in range(MOST + 1)], "scale has 101 keyframes"),
    ],
)
def test_what_is_neither_is_refused_by_its_name(value, expected):
    with pytest.raises(InputError, match=f"^{expected}") as caught:
        read_keyframes(value, "scale")
    assert "\n" not in str(caught.value)
