"""runtime.control.conditions: white lines on black where they belong, sizes kept, unknown names and models refused."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from runtime.control import conditions
from runtime.errors import InputError
from tests.support.depth_model import make_depth_model
from tests.support.refusals import refusal

EDGES = ["canny", "sobel", "sketch", "lineart"]


def square(size=128, inside=(255, 255, 255), outside=(0, 0, 0)):
    image = Image.new("RGB", (size, size), outside)
    ImageDraw.Draw(image).rectangle((size // 4, size // 4, size * 3 // 4 - 1, size * 3 // 4 - 1), inside)
    return image


def pen(size=512):
    """A black circle drawn with a pen on white paper."""
    image = Image.new("L", (size, size), 255)
    ImageDraw.Draw(image).ellipse(
        (size // 4, size // 4, size * 3 // 4, size * 3 // 4), outline=0, width=size // 50
    )
    return image


@pytest.mark.parametrize("name", [name for name in conditions.names() if name != "depth"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (70, 33), (200, 128)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_any_size_and_mode_is_kept_to_grey_or_rgb_of_that_size(name, size, mode):
    result = conditions.preprocess(name, Image.new(mode, size))
    assert result.size == size
    assert result.mode in ("L", "RGB")


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_white_on_black_and_only_at_the_edge(name):
    result = np.array(conditions.preprocess(name, square()))
    assert result.ndim == 2
    assert result[60:68, 30:36].max() > 200
    assert result[60:68, 50:78].max() == 0
    assert result[:20].max() == 0


@pytest.mark.parametrize("name", EDGES)
def test_a_flat_picture_has_no_edges(name):
    for value in (0, 128, 255):
        assert np.array(conditions.preprocess(name, Image.new("RGB", (64, 64), (value,) * 3))).max() == 0


@pytest.mark.parametrize("name", EDGES)
def test_colours_of_equal_luminance_have_an_edge(name):
    image = square(inside=(200, 0, 0), outside=(0, 102, 0))
    assert np.ptp(np.array(image.convert("L"))) <= 1
    assert np.array(conditions.preprocess(name, image)).max() > 100


def test_canny_is_binary_and_takes_thresholds():
    result = np.array(conditions.preprocess("canny", square()))
    assert set(np.unique(result)) == {0, 255}
    assert np.array(conditions.preprocess("canny", square(inside=(20,) * 3))).max() == 0
    assert np.array(conditions.preprocess("canny", square(inside=(20,) * 3), low=10, high=20)).max() == 255


def test_sobel_is_proportional_to_the_step():
    image = square(inside=(100, 100, 100))
    assert np.array(conditions.preprocess("sobel", image))[64, 32] == 100
    assert np.array(conditions.preprocess("sobel", square()))[64, 32] == 255


def test_sketch_of_a_pen_drawing_is_its_negative():
    drawing = pen()
    lines = np.array(conditions.preprocess("sketch", drawing), np.float32) / 255
    ink = 1 - np.array(drawing, np.float32) / 255
    assert lines[ink == 1].mean() > 0.95
    assert np.minimum(lines, ink).sum() / np.maximum(lines, ink).sum() > 0.9


def test_sketch_draws_like_lines_in_light_and_shadow():
    light, shadow = (
        np.array(conditions.preprocess("sketch", square(inside=(4 * k,) * 3, outside=(2 * k,) * 3))).max()
        for k in (60, 30)
    )
    assert light > 150
    assert shadow > 0.8 * light


def test_sketch_detail_makes_lines_finer():
    image = square(512)
    coarse, fine = (
        (np.array(conditions.preprocess("sketch", image, detail=detail)) > 127).sum() for detail in (1, 4)
    )
    assert 0 < fine < coarse / 2


def test_color_is_a_grid_of_means():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8))
    result = np.array(conditions.preprocess("color", image), np.float32)
    cells = result.reshape(8, 16, 12, 16, 3)
    assert (np.ptp(cells, axis=(1, 3)) == 0).all()
    means = np.array(image, np.float32).reshape(8, 16, 12, 16, 3).mean((1, 3))
    assert np.abs(cells[:, 0, :, 0] - means).max() <= 1


def test_color_cells_are_64_px_from_512_on():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 1024).astype(np.uint8), (512, 1)))
    steps = np.diff(np.array(conditions.preprocess("color", ramp))[0, :, 0].astype(int)).nonzero()[0] + 1
    assert steps.tolist() == list(range(64, 1024, 64))


def test_none_is_the_picture_itself():
    assert np.array_equal(np.array(conditions.preprocess("none", square())), np.array(square()))


def test_an_unknown_name_lists_the_known():
    text = refusal(conditions.preprocess, "cany", square())
    assert text == f"preprocess 'cany' is unknown; expected one of {', '.join(conditions.names())}"
    assert {"canny", "sobel", "sketch", "lineart", "color", "depth", "none"} <= set(conditions.names())


def test_a_bad_picture_is_named():
    assert refusal(conditions.preprocess, "canny", "none.png").startswith(
        "canny input: none.png does not exist"
    )


def test_register_adds_a_name_and_its_aliases(monkeypatch):
    monkeypatch.setattr(conditions, "_REGISTRY", dict(conditions._REGISTRY))

    @conditions.register("negative", "invert")
    def negative(image):
        return image.point(lambda value: 255 - value)

    assert {"negative", "invert"} <= set(conditions.names())
    assert conditions.preprocess("invert", Image.new("L", (1, 1), 55)).getpixel((0, 0)) == 200


def test_depth_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv(conditions.DEPTH_MODEL_VARIABLE, raising=False)
    text = refusal(conditions.preprocess, "depth", square())
    assert "install the package transformers" in text
    assert conditions.DEPTH_MODEL_VARIABLE in text
    monkeypatch.setenv(conditions.DEPTH_MODEL_VARIABLE, str(tmp_path / "none"))
    assert f"{tmp_path / 'none'} is not a folder" in refusal(conditions.preprocess, "depth", square())
    (tmp_path / "empty").mkdir()
    text = refusal(conditions.preprocess, "depth", square(), model=tmp_path / "empty")
    assert (
        "holds no depth-estimation model" in text or "requires the Torchvision library" in text
    )  # before 5.20
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refusal(conditions.preprocess, "depth", square(), model=tmp_path)


def test_depth_runs_a_model_of_a_local_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    make_depth_model().save_pretrained(tmp_path)
    transformers.DPTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    try:
        result = conditions.preprocess("depth", square(70), model=tmp_path)
    except InputError as error:
        if "needs another package" in str(error):
            pytest.skip(str(error))
        raise
    assert (result.size, result.mode) == ((70, 70), "L")
    assert result.getextrema() == (0, 255)
