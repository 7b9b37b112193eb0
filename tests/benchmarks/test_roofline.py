"""benchmarks.roofline: arithmetic and bytes of known operations, and rows that add up."""

import csv

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import roofline
from runtime.optimize.packed import PackedConv2d, PackedLinear, packs_here


def noted(run):
    with torch.inference_mode(), roofline.Timed() as timed:
        run()
    return [(kind, work, moved) for kind, _, work, moved in timed.operations]


def test_the_work_of_known_operations():
    x, weight = torch.randn(6, 16), torch.randn(10, 16)
    assert noted(lambda: F.linear(x, weight)) == [("linear", 2 * 6 * 10 * 16, 4 * (96 + 160 + 60))]
    image, kernel = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    (found,) = noted(lambda: F.conv2d(image, kernel, padding=1))
    assert found == ("convolution", 2 * 2 * 6 * 64 * 4 * 9, 4 * (512 + 216 + 768))
    query, key = torch.randn(2, 3, 8, 16), torch.randn(2, 3, 20, 16)
    (found,) = noted(lambda: F.scaled_dot_product_attention(query, key, key))
    assert found[:2] == ("attention", 2 * 2 * 2 * 3 * 8 * 20 * 16)
    (found,) = noted(lambda: roofline.ATTEND(query, key, key))
    assert found[:2] == ("attention", 2 * 2 * 2 * 3 * 8 * 20 * 16)
    kinds = [kind for kind, *_ in noted(lambda: F.silu(F.group_norm(image, 2)).permute(0, 2, 3, 1).clone())]
    assert kinds == ["normalisation", "pointwise", "copies"]


@pytest.mark.skipif(not packs_here(torch.bfloat16, torch.device("cpu")), reason="no bfloat16 arithmetic")
def test_packed_layers_do_as_much():
    x, weight = torch.randn(6, 16).bfloat16(), torch.randn(10, 16).bfloat16()
    layer = PackedLinear(weight, None)
    assert [f[:2] for f in noted(lambda: layer(x))] == [("linear", 2 * 6 * 10 * 16)]
    conv = PackedConv2d(torch.nn.Conv2d(4, 6, 3, padding=1).bfloat16())
    image = torch.randn(2, 4, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    conv(image)  # the first call of a size looks for its layout
    assert [f[:2] for f in noted(lambda: conv(image))] == [("convolution", 2 * 2 * 6 * 64 * 4 * 9)]


def test_writes_rows_that_add_up_and_a_picture(tmp_path):
    assert roofline.main(["--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "roofline.csv").open()))
    for case in {row["case"] for row in rows}:
        own = {row["kind"]: row for row in rows if row["case"] == case}
        step = own.pop("step")
        for key in ("floor_ms", "gflop", "calls"):
            assert sum(float(row[key]) for row in own.values()) == pytest.approx(float(step[key]), rel=0.01)
        assert (
            {"convolution", "linear", "attention", "normalisation", "pointwise"}
            <= own.keys()
            <= set(roofline.KINDS)
        )  # nothing of weight is "other"
        assert all(float(row["ms"]) > 0 for row in own.values())
    assert min(Image.open(tmp_path / "roofline.png").size) > 100


def test_nothing_to_measure_is_bad_input(tmp_path, capsys):
    assert roofline.main(["--repeats", "0", "--out", str(tmp_path)]) == 2
    assert "repeats 0: expected 1 or more" in capsys.readouterr().err
