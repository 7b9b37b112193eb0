"""runtime.control.masks: exact where it must be (0 stays 0, full stays 1), and aligned with the adapter's features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from runtime.control.masks import box, circle, feather, load_mask, mask_pyramid, read_mask, strokes
from runtime.errors import InputError
from tests.support.tolerances import assert_close


def sizes(height, width):
    """The four levels' sizes as the adapter makes them: a stride of 16, then of 32 rounded up."""
    fine = torch.empty(1, 1, height // 16, width // 16)
    coarse = F.avg_pool2d(fine, 2, ceil_mode=True)
    return [tuple(fine.shape[-2:])] * 2 + [tuple(coarse.shape[-2:])] * 2


def test_area_is_the_exact_average_of_each_cell():
    mask = torch.rand(1, 1, 128, 96)
    for level, (h, w) in zip(mask_pyramid(mask, sizes(128, 96)), sizes(128, 96), strict=True):
        assert level.shape == (1, 1, h, w)
        expected = mask.double().reshape(1, 1, h, 128 // h, w, 96 // w).mean((3, 5)).float()
        assert_close("average", level, expected)
        assert_close("adaptive_avg_pool2d", level, F.adaptive_avg_pool2d(mask, (h, w)))


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
@settings(max_examples=50)
def test_a_cell_is_zero_or_one_exactly_by_its_own_footprint(rows, columns, data):
    height, width = 16 * rows, 16 * columns
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    mask = box(height, width, (x0, y0, x1, y1))
    for stride, level in zip((16, 16, 32, 32), mask_pyramid(mask, sizes(height, width)), strict=True):
        for (i, j), value in np.ndenumerate(level[0, 0].numpy()):
            footprint = mask[0, 0, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            assert value == footprint.mean().item()


def test_the_last_partial_cell_sees_its_own_rows_only():
    mask = box(1040, 1024, (0, 1008, 1024, 1024))  # touches cell 31 of 33; cell 32 is rows 1024 to 1039
    assert mask_pyramid(mask, [(33, 32)])[0][0, 0, :, 0].nonzero().flatten().tolist() == [31]


def test_sizes_that_no_stride_gives_are_cut_evenly():
    mask = torch.rand(1, 1, 96, 100)
    assert torch.equal(mask_pyramid(mask, [(32, 30)])[0], F.adaptive_avg_pool2d(mask, (32, 30)))
    assert torch.equal(mask_pyramid(mask, [(192, 200)])[0], F.interpolate(mask, scale_factor=2))


def test_nearest_is_the_original_method():
    mask = torch.rand(2, 1, 80, 48)
    for level, size in zip(mask_pyramid(mask, sizes(80, 48), "nearest"), sizes(80, 48), strict=True):
        assert torch.equal(level, F.interpolate(mask, size=size, mode="nearest"))


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="mask mode 'cubic' is unknown; expected area or nearest"):
        mask_pyramid(torch.ones(1, 1, 16, 16), [(1, 1)], "cubic")


def test_load_mask_reads_every_kind_of_source(tmp_path):
    expected = box(20, 30, (5, 5, 15, 15))
    grey = Image.fromarray((expected[0, 0] * 255).byte().numpy())
    grey.convert("RGB").save(tmp_path / "mask.png")
    for source in (grey, tmp_path / "mask.png", expected, expected[0, 0].numpy() > 0, grey.convert("1")):
        mask = load_mask(source, 20, 30)
        assert torch.equal(mask, expected)
        assert mask.dtype == torch.float32


def test_white_on_a_transparent_layer_is_a_mask():
    layer = Image.new("RGBA", (4, 1), (255, 255, 255, 0))
    layer.putpixel((2, 0), (255, 255, 255, 255))
    assert load_mask(layer, 1, 4).flatten().tolist() == [0, 0, 1, 0]


KINDS = ["file", "picture", "array", "tensor"]


def as_kind(kind: str, pixels: np.ndarray, folder):
    """Return 8-bit pixels (H, W) or (H, W, C) as one of the sources of a mask."""
    if kind == "array":
        return pixels
    if kind == "tensor":
        tensor = torch.from_numpy(pixels)
        return tensor if tensor.ndim == 2 else tensor.movedim(-1, 0)
    if kind == "picture":
        return Image.fromarray(pixels)
    Image.fromarray(pixels).save(folder / "mask.png")
    return folder / "mask.png"


def read(kind: str, pixels, folder) -> list[float]:
    return read_mask(as_kind(kind, np.array(pixels, np.uint8), folder)).flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_two_dark_values_are_black_and_white(kind, tmp_path, recwarn):
    assert read(kind, [[0, 1, 0, 1]], tmp_path) == [0, 1, 0, 1]
    assert read(kind, [[0, 15, 0, 15]], tmp_path) == [0, 1, 0, 1]
    assert read(kind, [[0, 255, 128, 0]], tmp_path) == pytest.approx([0, 1, 128 / 255, 0])
    assert read(kind, [[0, 0, 0, 0]], tmp_path) == [0] * 4
    assert not recwarn


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_is_faint_everywhere_is_warned_of(kind, tmp_path):
    with pytest.warns(UserWarning, match="mask: its brightest value is 3 of 255"):
        assert read(kind, [[0, 1, 2, 3]], tmp_path) == pytest.approx([0, 1 / 255, 2 / 255, 3 / 255])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 0, 0)], ids=["black", "white", "red"])
def test_paint_of_one_colour_counts_by_its_opacity(kind, colour, tmp_path):
    pixels = [[(*colour, 0), (*colour, 255), (9, 99, 9, 0), (*colour, 51)]]
    assert read(kind, pixels, tmp_path) == pytest.approx([0, 1, 0, 0.2])


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_photograph_the_erased_part_counts(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 4))
    pixels[..., 3] = 255
    pixels[:16, :, 3] = 0
    assert read(kind, pixels, tmp_path) == [1.0] * 512 + [0.0] * 512


@pytest.mark.parametrize("kind", KINDS)
def test_of_flat_colours_all_that_is_not_black_counts(kind, tmp_path, recwarn):
    assert read(kind, [[(255, 0, 0), (0, 0, 0), (0, 0, 128), (3, 0, 2)]], tmp_path) == [1, 0, 1, 0]
    assert not recwarn


def test_a_palette_counts_by_its_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2, 0]], np.uint8), "P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(tmp_path / "voc.png")
    assert read_mask(tmp_path / "voc.png").flatten().tolist() == [0, 1, 1, 0]


def test_a_photograph_is_warned_of():
    pixels = torch.rand(3, 32, 32)
    with pytest.warns(UserWarning, match="mask: a picture in colour, taken by its brightness"):
        mask = read_mask(pixels)
    expected = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    torch.testing.assert_close(mask[0, 0], expected)


@pytest.mark.filterwarnings("ignore:mask. 160 x 160 px is stretched")
@pytest.mark.parametrize("size", [(16, 16), (50, 48), (640, 320)], ids=["smaller", "uneven", "larger"])
def test_resizing_keeps_zeros_and_ones_exact(size):
    mask = load_mask(box(160, 160, (0, 0, 80, 160)), *size)
    assert mask.shape == (1, 1, *size)
    assert (mask[..., : size[1] // 2] == 1).all()
    assert (mask[..., size[1] // 2 :] == 0).all()


def test_load_mask_warns_of_another_aspect_ratio_and_refuses_nan():
    with pytest.warns(UserWarning, match="region 1 mask: 20 x 10 px is stretched to 16 x 16"):
        load_mask(torch.ones(10, 20), 16, 16, "region 1 mask")
    with pytest.raises(InputError, match="region 1 mask: contains NaN"):
        load_mask(torch.full((16, 16), torch.nan), 16, 16, "region 1 mask")


def test_box_covers_pixels_by_their_centres():
    assert box(4, 6, (1, 0, 3, 2)).sum() == 4
    assert box(4, 6, (1, 0, 3, 2))[0, 0, :2, 1:3].all()
    assert box(4, 6, (0.6, 0, 1.4, 4)).sum() == 0
    assert box(4, 6, (-9, -9, 99, 99)).all()


def test_circle_has_its_area_and_centre():
    mask = circle(101, 201, (60.5, 50.5), 30)
    assert mask.sum().item() == pytest.approx(np.pi * 30**2, rel=0.01)
    y, x = mask[0, 0].nonzero().float().mean(0).tolist()
    assert (x + 0.5, y + 0.5) == pytest.approx((60.5, 50.5))


def test_strokes_are_as_wide_as_asked_with_round_ends():
    mask = strokes(40, 80, [(20, 20), (60, 20)], 10)
    assert mask[0, 0, :, 40].sum() == 10
    assert mask.sum().item() == pytest.approx(40 * 10 + np.pi * 5**2, rel=0.02)
    assert torch.equal(strokes(40, 80, [(30, 20)], 12), circle(40, 80, (30, 20), 6))
    bent = strokes(64, 64, [(10, 10), (50, 10), (50, 50)], 6)
    assert bent[0, 0, 10, 30] == 1
    assert bent[0, 0, 30, 50] == 1
    assert bent[0, 0, 30, 30] == 0


@pytest.mark.parametrize(
    ("paint", "expected"),
    [
        (lambda: box(8, 8, (4, 4, 4, 8)), "mask box (4, 4, 4, 8) is empty"),
        (lambda: box(8, 8, (0, 0, 8)), "expected 4 finite numbers"),
        (lambda: box(8, 8, (0, 0, 8, float("nan"))), "expected 4 finite numbers"),
        (lambda: circle(8, 8, (4, 4), 0), "mask circle radius 0; expected more than 0"),
        (lambda: strokes(8, 8, [], 4), "expected a point and a width"),
        (lambda: strokes(8, 8, [(1, 1)], 0), "expected a point and a width"),
        (lambda: feather(torch.ones(1, 1, 8, 8), -1), "mask feather radius -1; expected 0 or more"),
    ],
)
def test_impossible_shapes_are_refused(paint, expected):
    with pytest.raises(InputError) as caught:
        paint()
    assert expected in str(caught.value)


@given(radius=st.floats(0, 40), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_feather_never_grows_the_region(radius, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 1, 24, 32, generator=generator) * circle(24, 32, (12, 10), 9)
    soft = feather(mask, radius)
    assert soft.shape == mask.shape
    assert ((soft >= 0) & (soft <= mask)).all()
    assert torch.equal(soft == 0, mask == 0)


def test_feather_is_a_ramp_of_the_radius():
    mask = box(1, 32, (0, 0, 16, 1))
    assert feather(mask, 4)[0, 0, 0, 10:17].tolist() == [1, 1, 0.875, 0.625, 0.375, 0.125, 0]
    assert torch.equal(feather(mask, 0), mask)


def test_the_border_of_the_picture_is_no_edge():
    assert torch.equal(feather(torch.ones(1, 1, 16, 16), 5), torch.ones(1, 1, 16, 16))
    assert feather(box(16, 16, (0, 0, 16, 8)), 4)[0, 0, 0].min() == 1


def test_feathered_masks_are_exact():
    """OpenCV's distances are off in the last bit where its buffers happen to lie badly, in some runs only."""
    mask = torch.maximum(box(64, 64, (15, 10, 56, 50)), circle(64, 64, (35, 35), 25))
    inside = mask[0, 0] > 0
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    squares = (y[..., None] - y[~inside]) ** 2 + (x[..., None] - x[~inside]) ** 2
    distance = squares.min(-1).values.double().sqrt()  # of whole numbers
    assert torch.equal(feather(mask, 16.0), mask * ((distance - 0.5) / 16).clamp(0, 1).to(mask))


@pytest.mark.parametrize(("mode", "label"), [("I;16", 1), ("I;16", 100), ("I", 1), ("F", 0.001)])
def test_labels_in_more_than_8_bits_are_not_rounded_away(tmp_path, mode, label):
    """Segmentations are published as 16-bit PNG of small numbers."""
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    values = np.zeros((8, 8), kind)
    values[2:5, 2:5] = label
    image = Image.fromarray(values)
    image.save(tmp_path / "labels.tif")
    for source in (image, tmp_path / "labels.tif"):
        assert torch.equal(read_mask(source)[0, 0], torch.from_numpy(values > 0).float())


def soft_brush(colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A soft dab on a transparent layer that was kept multiplied by its alpha, as a browser's canvas is."""
    y, x = np.mgrid[:64, :64]
    alpha = np.round(np.clip(1.4 - np.hypot(y - 32, x - 32) / 24, 0, 1) * 255)
    kept = np.round(np.array(colour) * alpha[..., None] / 255)
    shown = np.round(kept * 255 / np.maximum(alpha[..., None], 1)).clip(0, 255)
    return np.dstack([shown, alpha]).astype(np.uint8), alpha / 255


@pytest.mark.parametrize("colour", [(200, 30, 30), (128, 128, 128), (30, 30, 30), (0, 0, 0), (255, 255, 255)])
def test_a_soft_brush_is_one_colour_where_rounding_changed_the_faint_edge(colour):
    layer, alpha = soft_brush(colour)
    np.testing.assert_allclose(read_mask(Image.fromarray(layer))[0, 0].numpy(), alpha, atol=1e-6)


def test_two_colours_on_a_layer_are_two():
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[:4], layer[4:, 4:] = (255, 255, 255, 255), (0, 0, 0, 255)
    assert read_mask(Image.fromarray(layer))[0, 0].numpy().tolist() == [[float(i < 4)] * 8 for i in range(8)]


def test_a_grey_photograph_with_an_erased_part_is_warned_of():
    grey = np.random.default_rng(0).integers(20, 235, (64, 64), np.uint8)
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[20:40, 20:40] = 0
    with pytest.warns(UserWarning, match="mask: a grey picture with transparency, taken by its brightness"):
        read_mask(Image.fromarray(np.dstack([grey, grey, grey, alpha])))
