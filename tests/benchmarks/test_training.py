"""benchmarks.training: both sides take the same model's steps."""

import argparse

import pytest
import torch

from benchmarks import training
from benchmarks.training_world import embedded_parts

OPTIONS = argparse.Namespace(batch=2, full_size=False, small=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return embedded_parts(OPTIONS, "fp32", tmp_path_factory.mktemp("world"))


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


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ([], "training.csv"),
        (["--full-size"], "training-full-size.csv"),
        (["--small"], "training-small.csv"),
        (["--full-size", "--small"], "training-small.csv"),
    ],
    ids=str,
)
def test_a_small_unets_rows_are_in_a_file_of_their_own(given, name, tmp_path, monkeypatch):
    row = dict.fromkeys(("side", "dtype", "samples_per_second", "ratio", "peak_gib", "loss_share"), "")
    monkeypatch.setattr(training, "measure", lambda *_: [row])
    assert training.main([*given, "--dtype", "fp32", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_loss_alone_is_timed_for_both_sides():
    times = training.loss_times(batch=2, side=16, repeats=1)
    assert times.keys() == set(training.SIDES) and all(min(seconds) > 0 for seconds in times.values())
