"""training.data.crops: every image lands whole in a bucket, and its condition and mask on the same place."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from training.data.crops import Crop, bucket_sizes, make_crop, nearest_bucket

SIDES = st.integers(16, 3000)
SDXL = bucket_sizes(1024, 64, 2.0)


@given(squares=st.integers(1, 20), step=st.sampled_from([16, 32, 64]), aspect=st.floats(1, 4))
def test_buckets_are_of_the_step_and_no_larger_or_longer_than_asked_for(squares, step, aspect):
    resolution = squares * step
    buckets = bucket_sizes(resolution, step, aspect)
    assert (resolution, resolution) in buckets and buckets == sorted(set(buckets))
    for height, width in buckets:
        assert height % step == width % step == 0
        assert 0 < height * width <= resolution**2
        assert max(height, width) <= aspect * min(height, width)
        assert (width, height) in buckets


@given(squares=st.integers(2, 20), step=st.sampled_from([16, 32, 64]), aspect=st.floats(1, 4))
def test_no_bucket_could_be_larger_both_ways(squares, step, aspect):
    resolution = squares * step
    for height, width in bucket_sizes(resolution, step, aspect):
        assert (height + step) * (width + step) > resolution**2


def test_the_buckets_of_1024_are_among_those_that_sdxl_was_trained_on():
    tall = [(1408, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 896), (1088, 960)]
    assert sorted([*tall, (1024, 1024), *(size[::-1] for size in tall)]) == SDXL
    assert bucket_sizes(1024, 64, 1.0) == [(1024, 1024)]


@given(height=SIDES, width=SIDES)
def test_the_nearest_bucket_is_the_one_of_the_nearest_aspect_ratio(height, width):
    def distance(bucket):
        return abs(math.log(bucket[1] / bucket[0]) - math.log(width / height))

    chosen = nearest_bucket((height, width), SDXL)
    assert distance(chosen) <= min(map(distance, SDXL)) + 1e-8


def test_of_equally_near_buckets_the_largest_is_taken():
    assert nearest_bucket((50, 100), [(64, 128), (128, 256), (32, 64)]) == (128, 256)
    assert nearest_bucket((100, 100), [(64, 128), (128, 64), (32, 64)]) in [(64, 128), (128, 64)]


CROPS = st.builds(
    lambda height, width, key, variant, flip: make_crop(
        (height, width), nearest_bucket((height, width), SDXL), key, variant, flip
    ),
    SIDES,
    SIDES,
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.integers(0, 5),
    st.booleans(),
)


@given(crop=CROPS)
def test_a_crop_lies_in_the_scaled_image_which_is_as_small_as_it_can_be(crop):
    (height, width), (h, w) = crop.bucket, crop.scaled
    assert 0 <= crop.top <= h - height and 0 <= crop.left <= w - width
    assert h == height or w == width
    assert h / crop.original[0] == pytest.approx(
        w / crop.original[1], rel=0.5 / min(h, w) + 0.5 / min(crop.bucket)
    )
    assert crop.time_ids[:3] == (*crop.original, crop.top) and crop.time_ids[4:] == crop.bucket


@given(height=st.integers(16, 600), width=st.integers(16, 600), variant=st.integers(0, 3))
@settings(max_examples=40)
def test_a_crop_of_an_image_is_of_the_buckets_size(height, width, variant):
    bucket = nearest_bucket((height, width), bucket_sizes(128, 32, 2.0))
    crop = make_crop((height, width), bucket, "key", variant, flip=True)
    assert crop.apply(Image.new("L", (width, height))).size == bucket[::-1]


def test_an_image_of_the_buckets_size_stays_as_it_is():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    crop = make_crop((64, 96), (64, 96), "key", 3, flip=False)
    assert crop == Crop((64, 96), (64, 96), 0, 0, (64, 96), False)
    assert np.array_equal(np.asarray(crop.apply(image)), np.asarray(image))


def test_the_first_crop_is_the_centre():
    assert make_crop((64, 100), (64, 64), "key", 0, flip=True) == Crop(
        (64, 100), (64, 100), 0, 18, (64, 64), False
    )
    assert make_crop((200, 128), (64, 64), "key", 0, flip=True) == Crop(
        (200, 128), (100, 64), 18, 0, (64, 64), False
    )


def test_the_other_crops_lie_anywhere_by_key_and_variant():
    lefts = [make_crop((64, 74), (64, 64), f"{n}", 1, flip=False).left for n in range(300)]
    assert set(lefts) == set(range(11))
    assert len({make_crop((64, 640), (64, 64), "key", v, flip=False).left for v in range(1, 6)}) > 3


@given(crop=CROPS, key=st.text("0123456789abcdef", min_size=1), variant=st.integers(0, 5))
def test_the_same_key_and_variant_give_the_same_crop(crop, key, variant):
    first, second = (make_crop(crop.original, crop.bucket, key, variant, flip=True) for _ in range(2))
    assert first == second


def test_every_second_crop_is_mirrored_where_that_is_asked_for():
    assert [make_crop((64, 96), (64, 64), "key", v, flip=True).flip for v in range(4)] == [
        False,
        True,
        False,
        True,
    ]
    assert not any(make_crop((64, 96), (64, 64), "key", v, flip=False).flip for v in range(4))


def test_mirroring_changes_nothing_but_the_side():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    straight, mirrored = (
        np.asarray(make_crop((64, 96), (64, 64), "key", 1, flip).apply(image)) for flip in (0, 1)
    )
    assert np.array_equal(mirrored, straight[:, ::-1])


@pytest.mark.parametrize(("variant", "flip"), [(0, True), (1, False), (1, True), (2, True), (3, True)])
def test_the_model_is_told_the_corner_in_the_image_as_it_is_shown(variant, flip):
    """A mirrored crop is one of the mirrored image, there where the ids say: diffusers' trainers mirror first."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 240, 3), np.uint8))
    crop = make_crop((128, 240), (128, 128), "key", variant, flip)
    _, _, top, left, height, width = crop.time_ids
    shown = ImageOps.mirror(image) if crop.flip else image
    cut = shown.crop((left, top, left + width, top + height))
    assert np.array_equal(np.asarray(crop.apply(image)), np.asarray(cut))


def ramps(height, width):
    """A picture of which every pixel tells where in the image it lies: x in red, y in green, 0 to 255."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([(x + 0.5) / width, (y + 0.5) / height, 0 * x], axis=-1) * 255
    return Image.fromarray(picture.round().astype(np.uint8))


@pytest.mark.parametrize("variant", [0, 1, 2, 3])
@pytest.mark.parametrize("factor", [1, 2, 0.5])
def test_a_condition_of_another_size_lands_on_the_same_place(variant, factor):
    height, width = 200, 120
    crop = make_crop((height, width), (96, 96), "key", variant, flip=True)
    image = crop.apply(ramps(height, width))
    other = crop.apply(ramps(int(height * factor), int(width * factor)))
    near = np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16))
    assert near.max() <= 4  # of 255: a pixel of the smallest of the two is 4 wide there


def test_labels_are_resized_without_new_ones():
    labels = Image.fromarray(np.random.default_rng(0).choice([3, 700], (60, 90)).astype(np.int32))
    cut = make_crop((60, 90), (64, 64), "key", 1, flip=True).apply(labels, Image.Resampling.NEAREST)
    assert set(np.unique(np.asarray(cut))) == {3, 700}
