"""benchmarks.quality.evaluate and .curves: what is drawn for a measure, and that measures tell good from bad."""

from functools import cache

import numpy as np
import pytest
import torch

from benchmarks.quality.curves import SWEEPS, sweep
from benchmarks.quality.distribution import vae_features
from benchmarks.quality.evaluate import LEAKAGE_BINS, Drawer, diversity, evaluate, measure, summary
from benchmarks.quality.samples import Sample, held_out_samples
from runtime import LocalControlPipeline

STEPS = 2


@cache
def pipe():
    return LocalControlPipeline.from_pretrained("embedded")


@cache
def samples():
    return tuple(held_out_samples(2, ("half",)))


def drawer(**options):
    return Drawer(pipe(), "canny", steps=STEPS, **options)


@cache
def figures():
    """Of one sample, all there are."""
    features = vae_features(pipe().model.vae)
    return measure(samples()[0].picture, samples()[1].picture, samples()[0], features=features)


def real(i=0):
    return samples()[i].picture


def test_the_real_picture_follows_perfectly():
    found = measure(real(), real(), samples()[0])
    perfect = ("coincidence", "precision", "recall", "f1", "colours", "shapes", "background")
    assert all(found[name] == 1 for name in perfect) and found["ssim"] == pytest.approx(1)
    nothing = (
        "lfmse_inside",
        "lfmse_outside_wanted",
        "sobel_outside_wanted",
        "hallucinated_inside",
        "leakage",
        "seam",
    )
    assert all(found[name] == pytest.approx(0, abs=1e-12) for name in nothing)
    assert found["lfmse_total"] == found["lfmse_outside"] > 0.5


def test_another_picture_follows_worse_in_every_measure():
    good, bad = measure(real(), real(), samples()[0]), measure(real(1), real(), samples()[0])
    for name in ("coincidence", "precision", "recall", "f1", "ssim", "shapes"):
        assert bad[name] < good[name], name
    for name in ("lfmse_inside", "sobel_inside", "hallucinated_inside", "leakage"):
        assert bad[name] > good[name], name


def test_what_changes_inside_alone_is_no_leakage():
    image = real().copy()
    image[:, :64] = 0
    features = vae_features(pipe().model.vae)
    found = measure(image, real(), samples()[0], features=features)
    assert found["leakage"] == 0 and found["perceptual"] == 0 and found["leakage_0px"] == 0
    image[:, 100:] = 0
    found = measure(image, real(), samples()[0], features=features)
    assert (
        found["leakage"] > 0 and found["perceptual"] > 0 and found["leakage_0px"] == 0 < found["leakage_32px"]
    )


def test_without_a_real_picture_or_scene_their_figures_are_absent():
    bare = Sample(0, "a", samples()[0].condition, samples()[0].mask, "half")
    missing = figures().keys() - measure(real(), real(), bare).keys()
    assert missing == {"colours", "shapes", "background", "perceptual"} | {
        f"sobel_{name}" for name in ("inside", "outside", "total", "outside_wanted")
    }


def test_a_free_picture_is_drawn_once_and_shared():
    first = drawer()
    kept = first.free_picture(samples()[0])
    other = drawer(free=first.free)
    other.pipe = None  # nothing more is drawn
    assert other.free_picture(samples()[0]) is kept


def test_methods_draw_as_they_say():
    sample = samples()[0]
    whole = Sample(0, sample.prompt, sample.condition, torch.ones_like(sample.mask), "whole")
    free = drawer(control="none")(sample)
    everywhere = drawer(control="everywhere")(sample)
    assert np.array_equal(free, drawer().free_picture(sample)) and not np.array_equal(free, everywhere)
    assert np.array_equal(drawer()(whole), everywhere) and np.array_equal(
        drawer(control="input")(whole), everywhere
    )
    drawn = [drawer(control="input")(sample), everywhere]
    assert not any(np.array_equal(drawer()(sample), other) for other in drawn)
    uneven = next(held_out_samples(1, ("random",)))  # not at whole cells of the levels
    assert not np.array_equal(drawer()(uneven), drawer(mask_resize="nearest")(uneven))
    assert np.array_equal(drawer()(sample, scale=0.0), free)


def test_rows_and_their_summary():
    kept = []
    rows = list(evaluate(drawer(), samples(), keep=lambda *drawn: kept.append(drawn)))
    assert [(r["number"], r["mask"], r["prompted"]) for r in rows] == [(0, "half", True), (1, "half", True)]
    assert len(kept) == 2 and np.array_equal(kept[0][1], drawer()(samples()[0]))
    found = summary(rows)
    assert found["lfmse_inside"].mean == pytest.approx(np.mean([r["lfmse_inside"] for r in rows]))
    assert found["lfmse_inside"].n == 2 and not found.keys() & {"number", "mask", "prompted"}
    assert {f"leakage_{near}px" for near in LEAKAGE_BINS} <= found.keys()


def test_nothing_is_injected_outside_by_masked_features_alone():
    sample = samples()[0]
    assert drawer().injected_outside(sample) == 0 == drawer(control="none").injected_outside(sample)
    assert drawer(control="input").injected_outside(sample) > 0.05
    assert drawer(control="everywhere").injected_outside(sample) > 0.1


def test_diversity_of_one_picture_drawn_twice_is_none():
    rows = list(diversity(drawer(), samples()[:1], [3, 3]))
    assert rows[0]["diversity_outside"] == 0 == rows[0]["diversity_inside"]
    assert next(diversity(drawer().free_picture, samples()[:1], [3, 4]))["diversity_outside"] > 0


def test_a_sweep_has_a_row_for_every_value_and_figure(monkeypatch):
    monkeypatch.setitem(SWEEPS, "scale", (0.0, 1.0))
    monkeypatch.delitem(SWEEPS, "start")
    monkeypatch.delitem(SWEEPS, "end")
    rows = list(sweep(drawer(), samples()[:1]))
    assert {(r["field"], r["value"], r["figure"]) for r in rows} == {
        ("scale", value, figure) for value in (0.0, 1.0) for figure in ("lfmse_inside", "f1", "leakage")
    }
    assert next(r for r in rows if (r["value"], r["figure"]) == (0.0, "leakage"))["mean"] == 0
