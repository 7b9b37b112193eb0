"""training.metrics: known answers, and equality with the original's formulas written out once more in torch."""

from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch

from runtime.control.masks import box
from training.metrics import LFMSE, DiffCC, diffcc, lfmse_canny, lfmse_sobel

pytestmark = pytest.mark.filterwarnings("error")  # no mean of nothing, no division by 0

NAN = float("nan")
SEEDS = range(50)
LFMSES = [lfmse_canny, lfmse_sobel]


def small(image, **how):
    """Reduced 8 times in uint8, then as a tensor in [0, 1]."""
    size = image.shape[1] // 8, image.shape[0] // 8
    return torch.from_numpy(cv2.resize(image, size, **how)) / 255.0


def blurred(image):
    return cv2.GaussianBlur(image, (11, 11), 5)


def by_formula(made, wanted, outside_wanted, mask):
    """The original's masked means; `wanted` may be anything outside the mask."""
    aim = torch.where(mask > 0, wanted, 0.0) + torch.where(1 - mask > 0, 1.0, 0.0)
    inside = (made - wanted).square()[mask > 0].mean()
    outside = (made - aim).square()[1 - mask > 0].mean()
    ours = (made - outside_wanted).square()[1 - mask > 0].mean()
    return LFMSE(*(float(figure) for figure in (inside, outside, inside + outside, ours)))


def original_canny(made, wanted, mask):
    """mask: (H, W) uint8, as in all three."""
    mask = small(mask, interpolation=cv2.INTER_NEAREST)
    made, wanted = small(blurred(made)), small(blurred(wanted))
    return by_formula(made, wanted, wanted, mask)


def original_sobel(made, wanted, mask):
    """With a mask of floats: of uint8, the original's 1 - mask is above 0 inside too."""
    made, wanted, mask = (torch.from_numpy(m).double() for m in (made, wanted, mask))
    masked = wanted * (mask > 0)
    return by_formula(made / made.max(), masked / masked.max(), wanted / wanted.max(), mask / 255)


def original_diffcc(made, wanted, mask):
    mask = small(mask, interpolation=cv2.INTER_NEAREST)
    made, wanted = small(blurred(made)), small(blurred(wanted))
    difference, free = (wanted - made) * mask, made * (1 - mask)
    missed = (difference > 0).sum() / torch.count_nonzero(wanted[mask > 0])
    more = (difference < 0).sum() / torch.count_nonzero(mask)
    drawn = (free > 0).sum() / torch.count_nonzero(1 - mask)
    return DiffCC(float(1 - missed), float(more), float(drawn))


def lines(rng, height, width):
    """A few edges one pixel wide on black."""
    image = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, 6)):
        ends = rng.integers(0, (width, height), (2, 2)).tolist()
        cv2.line(image, *ends, 255)
    return image


def greys(rng, height, width):
    """Broad edges of every strength, with maxima below 255."""
    coarse = rng.integers(0, rng.integers(20, 256), (height // 6, width // 6), dtype=np.uint8)
    return cv2.resize(coarse, (width, height))


def random_case(seed, draw):
    """Two maps and a mask of one box, of any size from 16 to 159; made is partly what was wanted."""
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(16, 160, 2))
    made, wanted = draw(rng, height, width), draw(rng, height, width)
    made[:, : width // 3] = wanted[:, : width // 3]
    top, left = rng.integers(0, (height - 8, width - 8))
    bottom, right = rng.integers((top + 8, left + 8), (height, width), endpoint=True)
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return made, wanted, mask


def soft(mask):
    """8 bits, with zeros, ones and all between where there is room for them."""
    return cv2.blur(mask, (9, 9))


def assert_equal(found, expected):
    assert asdict(found) == pytest.approx(asdict(expected), abs=1e-6, nan_ok=True)


def grey(value, height=64, width=64):
    return np.full((height, width), value, np.uint8)


def top(height=32):
    """A map or mask of ones above and zeros below, 64 x 64."""
    return (np.arange(64) < height)[:, None].repeat(64, 1).astype(np.float32)


def left():
    return top().T.copy()


def full():
    return np.ones((64, 64), np.float32)


def white(share):
    return (share * 255).astype(np.uint8)


@pytest.mark.parametrize("softness", [np.copy, soft], ids=["binary", "soft"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("ours", "original", "draw"),
    [
        (lfmse_canny, original_canny, lines),
        (lfmse_sobel, original_sobel, greys),
        (diffcc, original_diffcc, lines),
        (diffcc, original_diffcc, greys),
    ],
    ids=["canny", "sobel", "diffcc", "diffcc-greys"],
)
def test_equals_the_originals_formula(ours, original, draw, seed, softness):
    made, wanted, mask = random_case(seed, draw)
    mask = softness(mask)
    assert_equal(ours(made, wanted, mask.astype(np.float32) / 255), original(made, wanted, mask))


def test_canny_of_even_greys():
    """0.2 made, 0.6 wanted: 0.4 off the condition, 0.8 off one."""
    assert_equal(lfmse_canny(grey(51), grey(153), left()), LFMSE(0.16, 0.64, 0.8, 0.16))


def test_canny_of_black_and_white():
    assert_equal(lfmse_canny(grey(0), grey(255), left()), LFMSE(1, 1, 2, 1))
    assert_equal(lfmse_canny(grey(255), grey(0), left()), LFMSE(1, 0, 1, 1))


def test_canny_in_a_soft_mask():
    """Every pixel is inside and outside; outside, the aim is the condition and one more."""
    assert_equal(lfmse_canny(grey(51), grey(153), full() / 2), LFMSE(0.16, 1.96, 2.12, 0.16))


def test_sobel_divides_each_map_by_its_maximum():
    """Made 0.5 and 1 of its maximum; wanted 1 inside by the maximum there, and 1 outside by that of the whole."""
    made, wanted = (np.where(left() > 0, *pair).astype(np.uint8) for pair in ((50, 100), (100, 200)))
    assert_equal(lfmse_sobel(made, wanted, left()), LFMSE(0.25, 0, 0.25, 0))


def test_sobel_has_no_blur():
    """One pixel of 64 x 32 inside, and none made outside."""
    wanted = grey(0)
    wanted[10, 10] = 200
    assert_equal(lfmse_sobel(grey(0), wanted, left()), LFMSE(1 / 2048, 1, 1 + 1 / 2048, 0))


def test_sobel_in_a_soft_mask():
    assert_equal(lfmse_sobel(grey(51), grey(153), full() / 2), LFMSE(0, 1, 1, 0))


def test_sobel_of_blank_maps():
    assert_equal(lfmse_sobel(grey(0), grey(0), left()), LFMSE(0, 1, 1, 0))
    assert_equal(lfmse_sobel(grey(9), grey(0), left()), LFMSE(1, 0, 1, 1))
    assert_equal(lfmse_sobel(grey(0), grey(9), left()), LFMSE(1, 1, 2, 1))


def test_diffcc_of_half_of_what_was_wanted():
    """White down to pixel 32: the blur reaches 5 pixels, so rows 0 to 2 of 8 are whole and 3 and 4 weaker."""
    assert_equal(diffcc(white(top()), grey(255), left()), DiffCC(3 / 8, 0, 5 / 8))


def test_diffcc_of_more_than_was_wanted():
    assert_equal(diffcc(grey(255), white(top()), left()), DiffCC(1, 5 / 8, 1))


def test_diffcc_of_the_same_and_of_nothing():
    assert_equal(diffcc(white(top()), white(top()), left()), DiffCC(1, 0, 5 / 8))
    assert_equal(diffcc(grey(0), white(top()), left()), DiffCC(0, 0, 0))


def test_diffcc_in_a_soft_mask():
    assert_equal(diffcc(grey(255), white(top()), full() / 2), DiffCC(1, 5 / 8, 1))


def test_diffcc_of_a_blank_condition_has_no_coincidence():
    assert_equal(diffcc(white(top()), grey(0), left()), DiffCC(NAN, 5 / 8, 5 / 8))
    assert_equal(diffcc(grey(0), grey(0), left()), DiffCC(NAN, 0, 0))


@pytest.mark.parametrize("lfmse", LFMSES)
def test_what_the_mask_leaves_empty_has_no_lfmse(lfmse):
    whole, none = (lfmse(grey(255), grey(255), mask) for mask in (full(), 0 * full()))
    assert_equal(whole, LFMSE(0, NAN, NAN, NAN))
    assert_equal(none, LFMSE(NAN, 0, NAN, 0))


def test_what_the_mask_leaves_empty_has_no_diffcc():
    assert_equal(diffcc(grey(255), grey(255), full()), DiffCC(1, 0, NAN))
    assert_equal(diffcc(grey(255), grey(255), 0 * full()), DiffCC(NAN, NAN, 1))


@pytest.mark.parametrize("measure", [*LFMSES, diffcc])
def test_a_mask_may_be_bool_and_a_little_off_one(measure):
    """Feathering in floats ends just below 1, which is no part of the outside."""
    made, wanted = grey(255), white(top())
    expected = measure(made, wanted, left())
    assert_equal(measure(made, wanted, left() > 0), expected)
    assert_equal(measure(made, wanted, left() * np.float32(0.999999)), expected)


@pytest.mark.parametrize(("height", "width"), [(48, 128), (128, 48), (53, 125), (125, 53)])
@pytest.mark.parametrize("lfmse", LFMSES)
def test_each_part_has_its_own_error(lfmse, height, width):
    """Edges that differ in one corner only, far from the rest of the picture, of any shape and size."""
    wanted = lines(np.random.default_rng(0), height, width)
    wanted[0, 0] = 255  # one maximum for all
    made = wanted.copy()
    made[-16:, -16:] = 255 - made[-16:, -16:]
    corner = box(height, width, (width - 32, height - 32, width, height))[0, 0].numpy()
    assert lfmse(made, wanted, 1 - corner).inside == 0 < lfmse(made, wanted, corner).inside
    assert lfmse(made, wanted, corner).outside_wanted == 0 < lfmse(made, wanted, 1 - corner).outside_wanted


def test_the_outside_falls_as_more_edges_are_drawn_there():
    share = np.random.default_rng(0).random((64, 64))
    errors = [lfmse_canny(white(share < s), grey(0), left()).outside for s in (0.05, 0.2, 0.5)]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1] + 0.1


def test_canny_edges_a_pixel_off_count_as_near():
    wanted = grey(0)
    wanted[:, 20] = 255
    near, far = (lfmse_canny(np.roll(wanted, by, axis=1), wanted, full()).inside for by in (1, 24))
    assert near < 0.05 * far
