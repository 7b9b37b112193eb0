"""benchmarks.training and benchmarks.presets: both sides take the same model's steps."""

import argparse
import csv

import pytest
import torch

from benchmarks import presets, training
from training.config import PRESETS
from training.embedded.evaluate import held_out_scenes

OPTIONS = argparse.Namespace(batch=2, full_size=False, small=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return training.embedded_parts(OPTIONS, "fp32", tmp_path_factory.mktemp("world"))


def test_both_sides_train_an_adapter_of_their_own(world, monkeypatch):
    adapters = []
    make = training._adapter
    monkeypatch.setattr(training, "_adapter", lambda world: adapters.append(make(world)) or adapters[-1])
    steps = [training.our_step(world), training.diffusers_step(world)]
    before = [[p.detach().clone() for p in adapter.parameters()] for adapter in adapters]
    assert all(torch.equal(a, b) for a, b in zip(*before, strict=True))
    for step, adapter, was in zip(steps, adapters, before, strict=True):
        step()
        assert not any(torch.equal(p, w) for p, w in zip(adapter.parameters(), was, strict=True))


def test_loss_alone_is_timed_for_both_sides():
    times = training.loss_times(batch=2, side=16, repeats=1)
    assert times.keys() == set(training.SIDES) and all(min(seconds) > 0 for seconds in times.values())


def test_presets_differ_in_their_method_alone(tmp_path):
    config = [presets.configuration(name, 0, 10, tmp_path) for name in PRESETS if name != "paper"]
    method = {"control", "z0_loss", "preset", "out"}
    rest = [{k: v for k, v in c.to_json().items() if k not in method} for c in config]
    assert all(r == rest[0] for r in rest)


def test_every_preset_is_drawn_with_the_same_conditions_and_masks():
    scene = held_out_scenes(1)[0]
    first, again = presets.control(scene, 0), presets.control(scene, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    condition, mask = first
    assert condition.shape == mask.shape == (1, 128, 128) and 0 < mask.mean() < 1


def test_committed_table_has_every_preset_and_seed():
    with (presets.results_folder().parent / "cpu" / "presets.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {(row["preset"], row["seed"]) for row in rows}
    assert runs == {(name, seed) for name in PRESETS for seed in "01"} | {("none", "0")}
    assert len({(row["steps"], row["batch"], row["scenes"]) for row in rows if row["preset"] != "none"}) == 1
