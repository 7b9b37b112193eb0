"""training.metrics: LFMSE as the original has it, against a slow computation in plain numpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.metrics import EdgeError, edge_error


def blurred(image):
    """Gaussian of 11 x 11, sigma 5; the border mirrored without its last pixel, as OpenCV does."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 5**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(image, 5, mode="reflect")
    height, width = image.shape
    return np.array(
        [[(padded[y : y + 11, x : x + 11] * kernel).sum() for x in range(width)] for y in range(height)]
    )


def reduced(image):
    """Means over blocks of 8 x 8."""
    height, width = image.shape
    return image.reshape(height // 8, 8, width // 8, 8).mean((1, 3))


def slow_edge_error(made, wanted, mask):
    made, wanted = (reduced(blurred(m / 255)) for m in (made, wanted))
    mask = reduced(mask)

    def mean(squared, weights):
        return (squared * weights).sum() / weights.sum()

    error, ones = (made - wanted) ** 2, (made - 1) ** 2
    return EdgeError(mean(error, mask), mean(error, 1 - mask), mean(ones, 1 - mask))


def assert_near(found, expected):
    for name in ("inside", "outside", "outside_ones"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-9), name


def edges(seed, height=48, width=64, share=0.1):
    return (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8) * 255


@given(height=st.integers(2, 6), width=st.integers(2, 6), seed=st.integers(0, 1000), soft=st.booleans())
@settings(max_examples=10)
def test_errors_are_those_of_the_slow_computation(height, width, seed, soft):
    size = 8 * height, 8 * width
    mask = np.random.default_rng(seed).random(size)
    mask = mask if soft else (mask < 0.3).astype(np.float64)
    made, wanted = edges(seed, *size), edges(seed + 1, *size, share=0.2)
    assert_near(edge_error(made, wanted, mask.astype(np.float32)), slow_edge_error(made, wanted, mask))


def left(width=32):
    mask = np.zeros((48, 64), np.float32)
    mask[:, :width] = 1
    return mask


def test_the_same_edges_have_no_error():
    error = edge_error(edges(0), edges(0), left())
    assert (error.inside, error.outside) == (0, 0) and error.outside_ones > 0.5


def test_each_half_has_its_own_error():
    """Edges that differ far from the middle only: an error on that side alone."""
    wanted = edges(0)
    made = wanted.copy()
    made[:, 48:] = 255
    error = edge_error(made, wanted, left())
    assert error.inside == 0 < error.outside
    swapped = edge_error(made, wanted, 1 - left())
    assert (swapped.inside, swapped.outside) == (error.outside, error.inside)


def test_the_whole_error_is_the_mean_of_its_parts():
    mask = left(16)
    error = edge_error(edges(0), edges(1), mask)
    whole = edge_error(edges(0), edges(1), np.ones_like(mask)).inside
    assert 0.25 * error.inside + 0.75 * error.outside == pytest.approx(whole, rel=1e-5)


def test_black_against_white_is_one():
    black, white = np.zeros((48, 64), np.uint8), np.full((48, 64), 255, np.uint8)
    assert_near(edge_error(black, white, left()), EdgeError(1, 1, 1))
    assert_near(edge_error(white, black, left()), EdgeError(1, 1, 0))


def test_the_last_measure_falls_as_more_edges_are_drawn_outside():
    measures = [edge_error(edges(0, share=s), edges(1), left()).outside_ones for s in (0.05, 0.2, 0.5)]
    assert measures == sorted(measures, reverse=True) and measures[0] > measures[-1] + 0.1


def test_edges_a_pixel_off_count_as_near():
    wanted = np.zeros((48, 64), np.uint8)
    wanted[:, 20] = 255
    near, far = np.roll(wanted, 1, axis=1), np.roll(wanted, 24, axis=1)
    whole = np.ones((48, 64), np.float32)
    assert edge_error(near, wanted, whole).inside < 0.05 * edge_error(far, wanted, whole).inside


@pytest.mark.parametrize(("mask", "empty"), [(np.ones, ["outside", "outside_ones"]), (np.zeros, ["inside"])])
def test_what_the_mask_leaves_empty_has_no_error(mask, empty):
    error = edge_error(edges(0), edges(1), mask((48, 64), np.float32))
    found = [name for name in ("inside", "outside", "outside_ones") if math.isnan(getattr(error, name))]
    assert found == empty
