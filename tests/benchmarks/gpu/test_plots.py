"""benchmarks.gpu.plots: what was measured, as pictures; nothing where there is nothing."""

import shutil

import pytest
from PIL import Image

from benchmarks.gpu import plots
from benchmarks.measure import RESULTS


@pytest.mark.parametrize(("rows", "picture"), [("stages.csv", "stages.png"), ("kernels.csv", "kernels.png")])
def test_a_picture_of_the_rows(rows, picture, tmp_path):
    shutil.copy(RESULTS / "nvidia-h200" / rows, tmp_path)
    assert plots.main([str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([rows, picture])
    assert Image.open(tmp_path / picture).width > 600


def test_no_rows_no_picture(tmp_path):
    (tmp_path / "stages.csv").write_text("case,stage,p50_ms\na step,step,\n")
    plots.draw(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stages.csv"]
