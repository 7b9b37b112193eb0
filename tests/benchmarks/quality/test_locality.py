"""benchmarks.quality.locality, on pictures with known answers."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality import locality
from benchmarks.quality.locality import edge_scores, leakage, leakage_total, masked_ssim, seam

WHOLE = np.ones((32, 32))


def half(height=32, width=32):
    mask = np.zeros((height, width))
    mask[:, : width // 2] = 1
    return mask


def line(column, height=32, width=32):
    edges = np.zeros((height, width), np.uint8)
    edges[:, column] = 255
    return edges


def grey(level, height=32, width=32):
    return np.full((height, width, 3), level, np.uint8)


@pytest.mark.parametrize(("shift", "score"), [(0, 1.0), (1, 1.0), (2, 0.0), (5, 0.0)])
def test_an_edge_matches_within_the_tolerance(shift, score):
    scores = edge_scores(line(8 + shift), line(8), WHOLE)
    assert (scores.precision, scores.recall, scores.f1) == (score, score, score)


def test_precision_and_recall_are_told_apart():
    both = line(4) | line(20)
    assert edge_scores(both, line(4), WHOLE) == locality.EdgeScores(0.5, 1.0, pytest.approx(2 / 3))
    assert edge_scores(line(4), both, WHOLE) == locality.EdgeScores(1.0, 0.5, pytest.approx(2 / 3))


def test_only_edges_inside_count_but_a_match_may_lie_across_the_border():
    both = line(4) | line(20)
    assert edge_scores(both, line(4), half()).f1 == 1.0
    assert edge_scores(line(16), line(15), half()).recall == 1.0
    assert math.isnan(edge_scores(line(16), line(15), half()).precision)


def test_where_there_are_no_edges():
    none = np.zeros((32, 32), np.uint8)
    assert math.isnan(edge_scores(none, none, WHOLE).f1)
    missed, invented = edge_scores(none, line(4), WHOLE), edge_scores(line(4), none, WHOLE)
    assert (missed.recall, missed.f1, invented.precision, invented.f1) == (0, 0, 0, 0)


def test_similarity_is_one_for_equal_maps_and_looks_inside_only():
    made = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    assert masked_ssim(made, made, half()) == pytest.approx(1)
    changed = made.copy()
    changed[:, 24:] = 0
    assert masked_ssim(changed, made, half()) == pytest.approx(1)
    assert masked_ssim(changed, made, 1 - half()) < 0.6


def test_similarity_of_two_constants_is_known():
    made, wanted = (np.full((32, 32), level, np.uint8) for level in (100, 200))
    stable = (0.01 * 255) ** 2
    assert masked_ssim(made, wanted, WHOLE) == pytest.approx((2 * 2e4 + stable) / (1e4 + 4e4 + stable))


def test_similarity_needs_a_window():
    with pytest.raises(ValueError, match="10 x 12 px, expected 11 x 11"):
        masked_ssim(np.zeros((12, 10), np.uint8), np.zeros((12, 10), np.uint8), np.ones((12, 10)))


def test_leakage_is_found_at_its_distance():
    image = grey(100)
    image[:, 20:24] += 30  # 5 to 8 px from the mask, which ends with column 15
    curve = leakage(image, grey(100), half(), (0, 4, 8, 16, math.inf))
    assert curve[:3] == pytest.approx([0, 30, 0]) and math.isnan(curve[3])
    assert leakage_total(image, grey(100), half()) == pytest.approx(30 * 4 / 16)


def test_leakage_leaves_the_inside_out_and_means_channels():
    image = grey(100)
    image[:, :16] = 255
    assert leakage_total(image, grey(100), half()) == 0
    image[:, 16:, 1] = 91
    assert leakage_total(image, grey(100), half()) == pytest.approx(3)
    assert math.isnan(leakage_total(image, grey(100), WHOLE))


def test_a_step_along_the_border_is_a_seam():
    image = grey(100)
    image[:, 16:] = 140
    # Sobel / 8 spreads a step of 40 as 20 over the two columns beside it, of the eight in the band
    assert seam(image, grey(100), half(), width=4) == pytest.approx(20 * 2 / 8)
    assert seam(image, image, half()) == 0


def test_a_step_across_the_border_is_none():
    image = grey(100)
    image[16:] = 140
    assert seam(image, grey(100), half()) == pytest.approx(0, abs=1e-9)


def test_a_mask_without_a_border_has_no_seam():
    assert math.isnan(seam(grey(1), grey(2), WHOLE)) and math.isnan(seam(grey(1), grey(2), 0 * WHOLE))
    with pytest.raises(ValueError, match="width 0"):
        seam(grey(1), grey(2), half(), width=0)


def test_diversity_is_the_mean_over_pairs_outside():
    images = [grey(level) for level in (0, 30, 60)]
    for i, image in enumerate(images):
        image[:, :16] = 10 * i
    assert locality.diversity(images, half()) == pytest.approx((30 + 60 + 30) / 3)
    assert locality.diversity(images, 1 - half()) == pytest.approx((10 + 20 + 10) / 3)
    with pytest.raises(ValueError, match="1, expected 2 or more"):
        locality.diversity(images[:1], half())


@given(seed=st.integers(0, 99), columns=st.integers(1, 31))
@settings(max_examples=20, deadline=None)
def test_rings_add_up_to_the_whole_outside(seed, columns):
    rng = np.random.default_rng(seed)
    image, free = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32))
    mask[:, :columns] = 1
    bins = (0, 4, 8, 16, math.inf)
    counts = [min(32 - columns, far) - min(32 - columns, near) for near, far in pairwise(bins)]
    curve = np.nan_to_num(leakage(image, free, mask, bins))
    assert np.average(curve, weights=counts) == pytest.approx(leakage_total(image, free, mask))
