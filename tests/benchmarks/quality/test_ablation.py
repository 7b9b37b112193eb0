"""benchmarks.quality.ablation: what the variants differ in, what they are compared by, and the committed table."""

import csv
import json
import types

import pytest

from benchmarks.quality import ablation
from benchmarks.quality.ablation import (
    BASE,
    COMPARED,
    VARIANTS,
    configuration,
    differences,
    make_samples,
    table,
)

METHOD = {"control", "z0_loss", "z0_weight", "z0_schedule", "z0_from", "z0_to", "mask_resize", "out"}
FIGURES = dict.fromkeys(COMPARED, 0.5)


def row(number, mask="half", prompted=True, seed=0, **figures):
    return {"seed": seed, "number": number, "mask": mask, "prompted": prompted, **FIGURES, **figures}


def test_variants_differ_in_their_method_alone(tmp_path):
    configs = {name: configuration(name, 0, 10, tmp_path) for name in VARIANTS}
    rest = [{k: v for k, v in c.to_json().items() if k not in METHOD} for c in configs.values()]
    assert all(r == rest[0] for r in rest)
    assert len({c.out for c in configs.values()}) == len(VARIANTS)
    assert len(
        {
            tuple(sorted((k, v) for k, v in c.to_json().items() if k in METHOD - {"out"}))
            for c in configs.values()
        }
    ) == len(VARIANTS)


def test_the_issue_list_is_covered():
    losses = {(v.get("z0_loss"), v.get("z0_schedule", "constant")) for v in VARIANTS.values()}
    assert {("off", "constant"), ("mse", "constant"), ("laplacian", "constant")} <= losses
    assert {("sobel", s) for s in ("constant", "time", "step_range")} <= losses
    sweep = {v["z0_weight"] for v in VARIANTS.values() if v["z0_loss"] == "sobel" and "z0_schedule" not in v}
    assert 0.1 in sweep and len(sweep) >= 3
    assert {v["control"] for v in VARIANTS.values()} == {"everywhere", "input", "features"}


def test_every_scene_has_its_masks_with_a_prompt_and_one_without():
    samples = make_samples(2)
    assert len(samples) == 2 * 4 and [s.mask_kind for s in samples if not s.prompt] == ["random", "random"]


def test_a_row_of_the_table_is_a_mean_over_one_kind():
    rows = {"a": [row(0, f1=0.2), row(1, f1=0.4), row(0, "centre", f1=1.0), row(0, prompted=False, f1=0.0)]}
    found = {(r["mask"], r["prompt"]): r for r in table(rows) if r["figure"] == "f1"}
    assert found["half", "yes"]["mean"] == pytest.approx(0.3) and found["half", "yes"]["n"] == 2
    assert found["centre", "yes"]["mean"] == 1.0 and found["half", "no"]["mean"] == 0.0
    assert not any(r["figure"] == "seed" for r in table(rows))


def test_differences_are_taken_picture_by_picture_and_by_seed():
    base = [row(n, seed=s, f1=0.1 * n) for s in (0, 1) for n in range(5)]
    better = [row(n, seed=s, f1=0.1 * n + 0.01 * (s + 1)) for s in (0, 1) for n in range(5)]
    found = {r["figure"]: r for r in differences({"no control": base[:5], BASE: base, "better": better})}
    assert found["f1"]["mean"] == pytest.approx(0.015) and found["f1"]["seeds"] == "0.010000 0.020000"
    assert found["f1"]["low"] > 0  # scenes differ far more than that: only pairs tell it
    assert found["ssim"]["mean"] == 0 and {
        r["variant"] for r in differences({BASE: base, "better": better})
    } == {"better"}


def test_measures_are_kept_beside_the_adapter(tmp_path, monkeypatch):
    config = configuration(BASE, 0, 10, tmp_path)
    drawn = []
    monkeypatch.setattr(ablation.LocalControlPipeline, "from_pretrained", lambda *_: types.SimpleNamespace())
    monkeypatch.setattr(ablation, "evaluate", lambda *_: drawn.append(1) or iter([row(0)]))
    options = types.SimpleNamespace(work=tmp_path, count=1, engine=None)
    first, again = (ablation.measured(options, config, [], {}) for _ in range(2))
    assert first == again == [row(0)] and len(drawn) == 1
    assert json.loads((tmp_path / "masked-features-10-0" / "measures-1.json").read_text())["rows"] == first


def test_the_tradeoff_draws_both_methods_at_every_strength_and_keeps_it(tmp_path, monkeypatch):
    drawn = []

    def evaluate(config, samples, scale):
        drawn.append((config.control, config.seed, scale, len(samples)))
        return [row(s.number, lfmse_inside=scale, leakage=2 * scale) for s in samples]

    monkeypatch.setattr(ablation, "make_drawer", lambda options, config, free: config)
    monkeypatch.setattr(ablation, "evaluate", evaluate)
    options = types.SimpleNamespace(work=tmp_path, count=2, seeds=[0, 1], training_steps=10)
    points, again = (ablation.tradeoff(options, make_samples(2), {}) for _ in range(2))
    assert points == again and len(drawn) == 2 * 2 * len(ablation.SCALES)
    assert {control for control, *_ in drawn} == {"input", "features"} and all(n == 2 for *_, n in drawn)
    assert [p["scale"] for p in points] == 2 * list(ablation.SCALES)
    assert all(p["lfmse_inside_mean"] == p["scale"] and p["leakage_high"] == 2 * p["scale"] for p in points)


def test_the_committed_table_has_every_variant_and_seed():
    folder = ablation.results_folder().parent / "cpu" / "ablation"
    with (folder / "ablation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["variant"] for r in rows} == {"no control", *VARIANTS}
    kinds = {(r["mask"], r["prompt"]) for r in rows}
    assert kinds == {("random", "yes"), ("centre", "yes"), ("half", "yes"), ("random", "no")}
    with (folder / "differences.csv").open(newline="") as file:
        against = list(csv.DictReader(file))
    assert {r["variant"] for r in against} == set(VARIANTS) - {BASE}
    assert all(len(r["seeds"].split()) >= 3 for r in against)
