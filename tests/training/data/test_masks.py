"""training.data.masks: random masks for any size and options: their places, sizes and edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import MASK_SHAPES, TrainConfig
from training.data.masks import random_mask, segment_mask

SIDES = st.integers(1, 16).map(lambda n: 16 * n)
SEEDS = st.integers(0, 2**32)


def draw(seed, height, width, **options):
    """A mask of these options, by default with hard edges and never the whole image."""
    config = TrainConfig(**{"mask_full": 0.0, "mask_soft": 0.0, **options})
    return random_mask(np.random.default_rng(seed), height, width, config)


@given(
    height=SIDES,
    width=SIDES,
    seed=SEEDS,
    shapes=st.lists(st.sampled_from(MASK_SHAPES), min_size=1, unique=True),
    count=st.integers(1, 4),
    share=st.floats(0, 1),
    least=st.floats(0, 0.3),
)
@settings(max_examples=150)
def test_any_options_give_a_mask_of_the_image_with_something_in_it(
    height, width, seed, shapes, count, share, least
):
    options = {"mask_shapes": tuple(shapes), "mask_count": count, "mask_min_area": least}
    mask = draw(seed, height, width, mask_soft=share, mask_full=share, **options)
    assert mask.shape == (1, 1, height, width) and mask.dtype == torch.float32
    assert mask.min() >= 0 and 0 < mask.max() <= 1


@given(height=SIDES, width=SIDES, seed=SEEDS, least=st.floats(0, 0.3), count=st.integers(1, 3))
@pytest.mark.parametrize("shape", MASK_SHAPES)
@settings(max_examples=60)
def test_hard_masks_cover_the_least_area_where_the_shape_has_room_for_it(
    shape, height, width, seed, least, count
):
    mask = draw(seed, height, width, mask_shapes=(shape,), mask_count=count, mask_min_area=least)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    side = min(height, width)
    largest = {"square": side**2, "circle": math.pi * (side / 2 - 1) ** 2}.get(shape, height * width)
    assert mask.sum() >= min(least * height * width, largest)


@pytest.mark.parametrize("least", [0.05, 0.5, 1.0])
def test_a_box_can_be_asked_to_cover_anything_to_the_pixel(least):
    options = {"mask_shapes": ("box",), "mask_count": 1, "mask_min_area": least}
    assert all(draw(seed, 16, 32, **options).mean() >= least for seed in range(300))


@given(height=SIDES, width=SIDES, seed=SEEDS)
@pytest.mark.parametrize("shape", ["box", "square"])
def test_boxes_and_squares_are_what_they_are_called(shape, height, width, seed):
    mask = draw(seed, height, width, mask_shapes=(shape,), mask_count=1)[0, 0]
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    h, w = (int(found.max() - found.min() + 1) for found in (rows, columns))
    assert mask.sum() == h * w
    assert shape == "box" or h == w


@given(height=SIDES, width=SIDES, seed=SEEDS)
def test_circles_are_round_and_whole(height, width, seed):
    mask = draw(seed, height, width, mask_shapes=("circle",), mask_count=1)[0, 0]
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    h, w = (int(found.max() - found.min() + 1) for found in (rows, columns))
    assert abs(h - w) <= 1
    assert mask.sum().item() == pytest.approx(
        math.pi * h * w / 4, abs=3 * (h + w)
    )  # half a pixel along its rim


def test_shapes_are_placed_all_over_the_image():
    covered = torch.stack([draw(seed, 64, 96, mask_min_area=0.02)[0, 0] for seed in range(300)]).mean(0)
    assert covered.min() > 0 and covered.max() < 0.9


def test_more_shapes_than_one_are_drawn_together():
    one, four = (
        np.mean([draw(seed, 64, 64, mask_shapes=("square",), mask_count=n).mean() for seed in range(200)])
        for n in (1, 4)
    )
    assert four > 1.2 * one


def test_every_shape_that_was_asked_for_is_drawn():
    masks = [draw(seed, 64, 96, mask_shapes=("square", "circle"), mask_count=1)[0, 0] for seed in range(40)]
    squares = [bool(mask.sum() == mask.any(0).sum() * mask.any(1).sum()) for mask in masks]
    assert 10 < sum(squares) < 30


SQUARE = {"mask_shapes": ("square",), "mask_count": 1}  # cannot fill an image that is none


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_masks_is_the_whole_image(share):
    full = np.mean([bool((draw(seed, 64, 96, mask_full=share, **SQUARE) == 1).all()) for seed in range(400)])
    assert full == pytest.approx(share, abs=0.06 * (share % 1 > 0))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_masks_has_soft_edges(share):
    soft = np.mean([bool((draw(seed, 64, 96, mask_soft=share, **SQUARE) % 1).any()) for seed in range(300)])
    assert soft == pytest.approx(share, abs=0.1 * (share % 1 > 0))


@given(height=SIDES, width=SIDES, seed=SEEDS, shape=st.sampled_from(MASK_SHAPES))
def test_soft_edges_lie_inside_and_rise_over_an_eighth_of_the_side_at_most(height, width, seed, shape):
    hard = draw(seed, height, width, mask_shapes=(shape,))[0, 0]
    soft = draw(seed, height, width, mask_shapes=(shape,), mask_soft=1.0)[0, 0]
    assert torch.equal(soft > 0, hard > 0)
    outside = np.argwhere(hard.numpy() == 0)
    partial = np.argwhere((soft.numpy() > 0) & (soft.numpy() < 1))
    for y, x in partial[:: len(partial) // 10 + 1]:
        nearest = np.hypot(*(outside - (y, x)).T).min()
        assert nearest - 0.5 <= max(2, min(height, width) / 8) + 1e-4


@given(height=SIDES, width=SIDES, seed=SEEDS)
@settings(max_examples=30)
def test_a_mask_follows_from_its_generator_alone(height, width, seed):
    options = {"mask_soft": 0.5, "mask_full": 0.1}
    torch.manual_seed(seed)
    first = draw(seed, height, width, **options)
    torch.manual_seed(0)
    assert torch.equal(first, draw(seed, height, width, **options))


def test_other_generators_give_other_masks():
    masks = {draw(seed, 64, 64).numpy().tobytes() for seed in range(50)}
    assert len(masks) > 45


def segments(seed, labels, **options):
    config = TrainConfig(**{"mask_full": 0.0, **options})
    return segment_mask(np.random.default_rng(seed), labels, config)


LABELS = torch.tensor([[0, 0, 0, 7, 7, 7], [0, 0, 0, 7, 7, 300], [2, 2, 2, 2, 2, 2]]).float()[None, None]


@given(seed=SEEDS, count=st.integers(1, 5), values=st.lists(st.integers(0, 4), min_size=16, max_size=16))
def test_segment_masks_are_whole_labels_and_no_more_than_asked_for(seed, count, values):
    labels = torch.tensor(values).float().reshape(1, 1, 4, 4)
    mask = segments(seed, labels, mask_count=count, mask_min_area=0.0)
    chosen = labels[mask == 1].unique()
    assert mask.shape == labels.shape and mask.dtype == torch.float32
    assert torch.equal(mask, torch.isin(labels, chosen).float()) and 1 <= len(chosen) <= count


def test_labels_that_are_too_small_are_passed_over():
    chosen = {
        label
        for seed in range(50)
        for label in LABELS[segments(seed, LABELS, mask_min_area=0.2) == 1].tolist()
    }
    assert chosen == {0.0, 7.0, 2.0}


def test_the_largest_label_is_taken_where_all_are_too_small():
    for seed in range(10):
        assert torch.equal(segments(seed, LABELS, mask_min_area=0.9), (LABELS == 0).float())


def test_a_label_of_just_the_least_area_is_large_enough():
    labels = torch.tensor([[1, 1, 1, 2]]).float()[None, None]
    assert any(
        torch.equal(segments(seed, labels, mask_min_area=0.25), (labels == 2).float()) for seed in range(20)
    )


def test_every_label_and_every_number_of_them_is_drawn():
    drawn = [tuple(LABELS[segments(s, LABELS, mask_min_area=0.0) == 1].unique().tolist()) for s in range(300)]
    assert {label for labels in drawn for label in labels} == {0.0, 2.0, 7.0, 300.0}
    assert np.mean([len(labels) == 2 for labels in drawn]) == pytest.approx(0.5, abs=0.1)
    assert all(len(labels) in (1, 2) for labels in drawn)


def test_a_share_of_segment_masks_is_the_whole_image():
    full = np.mean([bool(segments(seed, LABELS, mask_full=0.3).all()) for seed in range(400)])
    assert full == pytest.approx(0.3, abs=0.06)
    assert segments(0, LABELS, mask_full=1.0).shape == LABELS.shape


def test_segment_masks_follow_from_their_generator():
    assert all(torch.equal(segments(seed, LABELS), segments(seed, LABELS)) for seed in range(20))
