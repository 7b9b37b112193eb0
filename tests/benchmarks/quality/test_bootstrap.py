"""benchmarks.quality.bootstrap: intervals against what is known of them."""

import math

import numpy as np
import pytest

from benchmarks.quality.bootstrap import Estimate, interval, paired


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    found = interval(values)
    assert found.mean == pytest.approx(values.mean()) and found.n == 1000
    half = 1.96 * values.std() / math.sqrt(1000)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found.low + half == pytest.approx(found.mean, abs=0.1 * half)


def test_the_mean_lies_inside_as_often_as_it_should():
    rng = np.random.default_rng(1)
    found = [interval(rng.exponential(1.0, 60), confidence=0.8, resamples=400, seed=i) for i in range(300)]
    share = np.mean([e.low <= 1.0 <= e.high for e in found])
    assert 0.7 < share < 0.88


def test_values_that_belong_together_count_once():
    scenes = np.random.default_rng(2).normal(size=30)
    repeated, groups = np.repeat(scenes, 8), np.repeat(np.arange(30), 8)
    alone, plain, grouped = interval(scenes), interval(repeated), interval(repeated, groups)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=1e-9)
    assert plain.high - plain.low < 0.5 * (grouped.high - grouped.low) and grouped.n == 240


def test_groups_of_other_sizes_weigh_by_their_values():
    found = interval(np.array([0.0, 1, 1, 1]), np.array(["a", "b", "b", "b"]))
    assert found.mean == 0.75 and (found.low, found.high) == (0, 1)


def test_nan_is_left_out():
    nan = float("nan")
    assert interval(np.array([1.0, nan, 3.0])) == interval(np.array([1.0, 3.0]))
    empty = interval(np.array([nan]))
    assert empty.n == 0 and math.isnan(empty.mean) and math.isnan(empty.low)
    assert interval(np.array([2.0])) == Estimate(2.0, 2.0, 2.0, 1)


def test_pairs_tell_what_their_spread_hides():
    theirs = np.random.default_rng(3).normal(0, 10, 50)
    ours = theirs + 0.1
    difference = paired(ours, theirs)
    assert difference.low == pytest.approx(0.1) and difference.high == pytest.approx(0.1)
    assert interval(ours).low < interval(theirs).mean


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(20.0)
    assert interval(values) == interval(values) != interval(values, seed=1)


def test_labels_must_match_their_values():
    with pytest.raises(ValueError, match="2 labels for 3 values"):
        interval(np.zeros(3), np.zeros(2))
