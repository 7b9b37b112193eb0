"""benchmarks.quality.plots: pictures are written whole, with what they are given."""

import numpy as np
from PIL import Image

from benchmarks.quality import plots
from benchmarks.quality.bootstrap import Estimate

ESTIMATE, NOTHING = Estimate(0.5, 0.4, 0.7, 9), Estimate(*[float("nan")] * 3, 0)


def opened(path):
    with Image.open(path) as image:
        image.load()
        return np.asarray(image.convert("RGB"))


def test_a_row_a_variant_even_where_a_figure_is_missing(tmp_path):
    table = {name: dict.fromkeys(plots.FIGURES, ESTIMATE) for name in ("a", "b")}
    table["b"]["f1"] = NOTHING
    plots.dots(table, tmp_path / "new" / "a.png")
    assert opened(tmp_path / "new" / "a.png").std() > 0


def test_curves_take_empty_distances(tmp_path):
    plots.leakage_curves({"ours": [ESTIMATE, ESTIMATE, NOTHING]}, (0, 4, 8), tmp_path / "a.png")
    assert opened(tmp_path / "a.png").std() > 0


def test_sweeps_and_tradeoffs_read_their_rows(tmp_path):
    rows = [
        {"field": field, "value": value, "figure": name, **vars(ESTIMATE)}
        for field in ("scale", "end") for value in (0.0, 1.0) for name in ("f1", "leakage")
    ]  # fmt: skip
    plots.sweeps(rows, tmp_path / "sweeps.png")
    points = [
        {"variant": name, "scale": scale, "lfmse_inside_mean": 1 - scale, "leakage_mean": scale}
        for name in ("a", "b") for scale in (0.5, 1.0)
    ]  # fmt: skip
    plots.tradeoff(points, tmp_path / "tradeoff.png")
    assert all(opened(tmp_path / f"{name}.png").std() > 0 for name in ("sweeps", "tradeoff"))


def test_a_sheet_shows_the_pictures_where_their_titles_stand(tmp_path):
    red, blue = (np.full((40, 60, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    plots.sheet([("first", [red, blue]), ("second", [blue, red])], ("one", "two"), tmp_path / "sheet.png")
    sheet = opened(tmp_path / "sheet.png").astype(int)
    reds, blues = ((sheet == colour).all(2) for colour in ((255, 0, 0), (0, 0, 255)))
    assert reds.sum() == blues.sum() == 2 * 40 * 60
    assert reds[:75, :69].sum() == 40 * 60  # the first column of the first row
