"""benchmarks.quality.report and .ablation_report: tables that a person reads."""

import numpy as np
import pytest
import torch

from benchmarks.quality import report
from benchmarks.quality.ablation_report import write_report
from benchmarks.quality.bootstrap import Estimate
from benchmarks.quality.samples import Sample

STAMP = {"device": "a processor", "commit": "abc"}


def test_figures_are_listed_with_their_meaning(tmp_path):
    found = {"lfmse_inside": Estimate(0.00123, 0.001, 0.0015, 12), "fid": Estimate(81.2, np.nan, np.nan, 12)}
    free = {"lfmse_inside": Estimate(0.004, 0.003, 0.005, 12)}
    report.write(tmp_path / "new" / "report.md", found, free, STAMP, 12, curves=False)
    text = (tmp_path / "new" / "report.md").read_text()
    assert "| lfmse_inside | 0.00123 (0.001 to 0.0015) | 0.004 (0.003 to 0.005) | 12 | lower |" in text
    assert "| fid | 81.2 |  | 12 |" in text and "nan" not in text
    assert "12 pictures; device a processor, commit abc." in text and "curves.png" not in text


def test_every_figure_that_is_measured_has_a_meaning():
    from tests.benchmarks.quality.test_evaluate import figures

    assert {name for name in figures() if "px" not in name} <= set(report.MEANINGS)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0012345, "0.00123"), (12.345, "12.3"), (1234.5, "1234"), (-0.0, "0")]
)
def test_three_digits(value, text):
    assert report.number(value) == text


def test_a_strip_shows_condition_both_pictures_and_their_difference():
    mask = torch.zeros(1, 4, 4)
    mask[..., :2] = 1
    image, free = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 90, np.uint8)
    shown, first, second, difference = report.strip(
        Sample(0, "", torch.ones(1, 4, 4), mask, "half"), image, free
    )
    assert first is image and second is free and (difference == 40).all()
    assert (shown[:, :2] == 255).all() and (shown[:, 2:] == 64).all()


def test_a_difference_counts_where_all_seeds_agree_and_the_interval_leaves_zero_out(tmp_path):
    def row(low, high, seeds):
        return {"variant": "v", "figure": "f1", "mean": 0.2, "low": low, "high": high, "n": 9, "seeds": seeds}

    against = [row(0.1, 0.3, "0.1 0.2 0.3"), row(-0.1, 0.3, "0.1 0.2 0.3"), row(0.1, 0.3, "-0.1 0.2 0.5")]
    overall = {name: {"f1": Estimate(0.5, 0.4, 0.6, 9)} for name in ("no control", "v")}
    of_masks = [
        {
            "variant": "v",
            "mask": "half",
            "prompt": prompt,
            "figure": "lfmse_inside",
            **vars(Estimate(*figures)),
        }
        for prompt, figures in {"yes": (0.1, 0.05, 0.2, 5), "no": (0.3, 0.2, 0.4, 4)}.items()
    ]
    write_report(tmp_path / "a.md", overall, of_masks, against, 9, "base", STAMP)
    text = (tmp_path / "a.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| v | f1")]
    assert [line.split("|")[-2].strip() for line in lines] == ["higher", "not clear", "not clear"]
    assert "| no control | 0.5 (0.4 to 0.6) |" in text
    assert "| variant | half | half, no prompt |" in text
    assert "| v | 0.1 (0.05 to 0.2) | 0.3 (0.2 to 0.4) |" in text
