"""The sheet: the right panels, edges coloured by where they are, nothing clipped."""

import numpy as np
import pytest
from PIL import Image

from runtime.control import sheet as module
from runtime.control.masks import box
from runtime.control.region import Region, pack
from runtime.control.sheet import INSIDE, OUTLINE, OUTSIDE, changed_outside, colour_edges, make_sheet, tint


def picture(size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Two white squares on black, one in each half."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    for x in (width // 8, 5 * width // 8):
        pixels[height // 4 : height // 2, x : x + width // 4] = 255
    return Image.fromarray(pixels)


def sheet_of(images, regions, prompt: str, seed: int) -> Image.Image:
    return make_sheet(images, pack(regions, images[0].height, images[0].width), prompt, seed)


def left_half(size: tuple[int, int] = (128, 128)):
    return box(size[1], size[0], (0, 0, size[0] // 2, size[1]))


def shares(image: Image.Image, colour) -> np.ndarray:
    """Which pixels have exactly this colour, (H, W) bool."""
    return (np.array(image) == np.uint8(colour)).all(axis=2)


def test_edges_have_one_colour_inside_and_another_outside():
    edges = colour_edges(picture(), left_half()[0, 0].numpy())
    inside, outside = shares(edges, INSIDE), shares(edges, OUTSIDE)
    assert inside[:, :64].sum() > 50
    assert outside[:, 64:].sum() > 50
    assert not inside[:, 64:].any()
    assert not outside[:, :64].any()
    assert not shares(colour_edges(picture(), None), INSIDE).any()


def test_a_tint_leaves_what_is_not_masked():
    tinted = np.array(tint(picture(), left_half()[0, 0].numpy()))
    assert np.array_equal(tinted[:, 64:], np.array(picture())[:, 64:])
    assert not np.array_equal(tinted[:, :64], np.array(picture())[:, :64])


@pytest.mark.parametrize("size", [(128, 128), (1024, 1024), (1024, 512), (64, 256)], ids=str)
def test_panels_are_of_a_size_to_be_looked_at(size):
    sheet = sheet_of([picture(size)], [Region(picture(size), mask=left_half(size))], "a prompt", 3)
    assert 900 < sheet.width < 2300
    assert 250 < sheet.height < 750
    paper = np.array(sheet)
    assert (paper[-5:] == 255).all()  # the margins stay empty: nothing is cut off
    assert (paper[:, -5:] == 255).all()
    assert (paper[:, :5] == 255).all()


def test_labels_fit_beside_the_narrowest_pictures(monkeypatch):
    labels = []
    shorten = module._shorten
    monkeypatch.setattr(module, "_shorten", lambda *a: labels.append((a[0], shorten(*a))) or labels[-1][1])
    region = Region(
        picture((16, 64)),
        mask=left_half((16, 64)),
        adapter="sketch",
        scale=0.75,
        start=0.25,
        end=0.75,
        levels=(1, 1, 0.5, 0.25),
    )
    sheet_of([picture((16, 64))], [region] * 10, "", 2**63 - 1)
    assert ("mask 10 over the condition",) * 2 in labels
    assert ("sketch, scale 0.75, levels 1:1:0.5:0.25",) * 2 in labels
    assert ("acts here, steps 25% to 75%",) * 2 in labels
    assert all(drawn == text for text, drawn in labels)


def test_too_long_a_label_is_cut_with_an_ellipsis():
    region = Region(picture(), adapter="a very long name of an adapter, longer than its column is wide")
    sheet = np.array(sheet_of([picture()], [region], "x" * 500, 0))
    assert (sheet[:, -5:] == 255).all()


def test_the_outline_is_the_masks_border():
    mask = np.zeros((128, 128), np.float32)
    mask[32:96, 32:96] = 0.01  # however faint: the control acts there
    drawn = shares(module._outlined(Image.new("RGB", (256, 256)), mask), OUTLINE)
    expected = np.zeros((256, 256), bool)
    expected[64:192, 64:192] = True
    expected[65:191, 65:191] = False
    assert np.array_equal(drawn, expected)


def test_regions_and_results_add_rows():
    region = Region(picture(), mask=left_half())
    one = sheet_of([picture()], [region], "a prompt", 0)
    many = sheet_of([picture()] * 3, [region, region], "a prompt", 0)
    assert many.width == one.width
    assert many.height > 2.5 * (one.height - 60)
    free = sheet_of([picture()], [], "a prompt", 0)
    assert free.width < one.width


def test_a_long_prompt_is_wrapped():
    short, long = (sheet_of([picture()], [], "word " * n, 0) for n in (1, 60))
    assert long.size[0] == short.size[0]
    assert short.height < long.height < short.height + 100


def test_a_held_outside_shows_the_difference_to_its_reference(monkeypatch):
    said = []
    monkeypatch.setattr(module, "_draw_panel", lambda sheet, panel, *_: said.append(panel))
    image, mask = picture(), left_half()
    other = np.array(image)
    other[10, 100] += 1  # outside the mask
    packed = pack([Region(image, mask=mask)], 128, 128)
    make_sheet([image, image], packed, "a prompt", 3, [image, Image.fromarray(other)])
    found = [panel for panel in said if panel.title == "difference to the reference x 4"]
    assert [panel.legend[0][1] for panel in found] == [
        "0 pixels differ outside the mask",
        "1 pixels differ outside the mask",
    ]
    assert np.array(found[1].picture)[20, 200].tolist() == [4, 4, 4]  # shown at twice its size
    assert len(said) == 2 + 2 * 3


def test_pixels_that_changed_are_counted_where_the_mask_is_black():
    image, other = np.zeros((2, 4, 4, 3), np.uint8)
    other[0, 0, 1] = other[3, 3] = 1
    mask = np.zeros((4, 4))
    mask[3, 3] = 0.01
    assert changed_outside(Image.fromarray(image), Image.fromarray(other), mask) == 1
