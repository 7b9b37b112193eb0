"""training.loop.checkpoint: what is saved comes back to the same bits, or is told to be damaged."""

import dataclasses
import errno
import json
import os

import pytest
import torch

from runtime.errors import InputError
from runtime.loading.adapter import load_adapter
from training.config import TrainConfig
from training.loop import checkpoint
from training.loop.checkpoint import OPTIMIZER, RUN, WEIGHTS, State
from training.loop.controls import new_adapter
from training.loop.learner import Learned, optimizer_tensors, whole
from training.loop.optimize import make_optimizer

SIZE = 32, 32, 32, 32


@pytest.fixture
def adapter():
    return new_adapter(SIZE, 1, 1).to(memory_format=torch.channels_last)


def trained(adapter, config, steps, optimizer=None):
    """An adapter after some steps whose gradients depend on its weights alone."""
    optimizer = optimizer or make_optimizer(list(adapter.parameters()), config)
    for _ in range(steps):
        sum(f.square().mean() for f in adapter(torch.ones(1, 1, 32, 32))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state_of(adapter, optimizer, step=1):
    names = [name for name, _ in adapter.named_parameters()]
    weights = {name: whole(p) for name, p in adapter.named_parameters()}
    return State(step, Learned(weights, weights, optimizer_tensors(optimizer, names)), 2, "data")


def saved(adapter, out, step=1, keep=3, **settings):
    config = TrainConfig(out=str(out), lr=1e-2, **settings)
    checkpoint.checkpoints(out).mkdir(exist_ok=True)
    state = state_of(adapter, trained(adapter, config, 2), step)
    shape = {k: v for k, v in adapter.config.items() if not k.startswith("_")}
    return checkpoint.save(state, config, shape, keep), config, state


def found(config, said=None, samples=2, data="data"):
    return checkpoint.find(config, samples, data, [].append if said is None else said.append)


def test_checkpoint_comes_back_whole(adapter, tmp_path):
    path, config, state = saved(adapter, tmp_path)
    where, again = found(config)
    assert where == path and (again.step, again.samples, again.data) == (1, 2, "data")
    for ours, theirs in zip(state.learned, again.learned, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("part", ["adapter", "ema"])
def test_checkpoints_weights_are_an_adapter(part, adapter, tmp_path):
    path, _, state = saved(adapter, tmp_path)
    loaded = load_adapter(path / part, device="cpu", dtype=torch.float32)
    assert all(torch.equal(p, state.learned.weights[name]) for name, p in loaded.named_parameters())


def test_only_the_last_ones_are_kept(adapter, tmp_path):
    for step in (5, 20, 100):
        saved(adapter, tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.newest(tmp_path)] == ["00000020", "00000100"]


def test_a_run_that_was_sent_back_goes_on_from_what_it_wrote_last(adapter, tmp_path):
    for step in (2, 4, 6):
        saved(adapter, tmp_path, step)
    path, config, _ = saved(adapter, tmp_path, 3)
    assert found(config)[0] == path
    saved(adapter, tmp_path, 4, keep=2)
    assert [path.name for path in checkpoint.newest(tmp_path)] == ["00000003", "00000004"]


def test_a_step_that_is_written_again_is_there_until_it_is_whole(adapter, tmp_path, monkeypatch):
    _, config, first = saved(adapter, tmp_path, 4, keep=1)

    def fill(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(checkpoint, "save_file", fill)
        with pytest.raises(InputError, match="No space left on device; the last checkpoint is"):
            saved(adapter, tmp_path, 4, keep=1)
    again = found(config)[1].learned.weights
    assert all(torch.equal(again[name], value) for name, value in first.learned.weights.items())
    path, _, last = saved(adapter, tmp_path, 4, keep=1)
    again = found(config)[1].learned.weights
    assert all(torch.equal(again[name], value) for name, value in last.learned.weights.items())
    assert list(path.parent.iterdir()) == [path]


def test_a_copied_runs_files_may_be_of_any_age(adapter, tmp_path):
    for step in (4, 6, 3):
        path, config, _ = saved(adapter, tmp_path, step)
    for age, step in enumerate((3, 6, 4)):
        os.utime(path.with_name(f"{step:08d}") / RUN, (age, age))
    assert found(config)[0] == path


def test_checkpoints_without_numbers_go_by_their_steps(adapter, tmp_path):
    for step in (2, 4):
        path, config, _ = saved(adapter, tmp_path, step)
        about = json.loads((path / RUN).read_text())
        del about["number"]
        (path / RUN).write_text(json.dumps(about))
    assert found(config)[0] == path
    assert saved(adapter, tmp_path, 3)[0] == found(config)[0]


@pytest.mark.parametrize("name", [f"adapter/{WEIGHTS}", f"ema/{WEIGHTS}", OPTIMIZER, RUN])
def test_damaged_checkpoint_gives_way_to_the_one_before(name, adapter, tmp_path):
    first, config, _ = saved(adapter, tmp_path, 1)
    second, *_ = saved(adapter, tmp_path, 2)
    file = second / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = []
    assert found(config, said)[0] == first
    assert len(said) == 1 and str(second) in said[0] and "trying the one before" in said[0]


def test_changed_checkpoint_gives_way_to_the_one_before(adapter, tmp_path):
    """Other bytes of the right length: only their hash tells."""
    first, config, _ = saved(adapter, tmp_path, 1)
    second, *_ = saved(adapter, tmp_path, 2)
    data = bytearray((second / OPTIMIZER).read_bytes())
    data[-1] ^= 1
    (second / OPTIMIZER).write_bytes(data)
    said = []
    assert found(config, said)[0] == first
    assert f"{OPTIMIZER} is not what was written" in said[0]


def test_no_readable_checkpoint_is_an_error(adapter, tmp_path):
    path, config, _ = saved(adapter, tmp_path)
    (path / OPTIMIZER).unlink()
    with pytest.raises(InputError, match="none of its checkpoints can be read"):
        found(config)


def test_named_checkpoint_has_to_be_readable(adapter, tmp_path):
    path, config, _ = saved(adapter, tmp_path)
    config = dataclasses.replace(config, resume=str(path))
    assert found(config)[0] == path
    (path / OPTIMIZER).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        found(config)


def test_what_must_not_change_is_named(adapter, tmp_path):
    _, config, _ = saved(adapter, tmp_path)
    changed = dataclasses.replace(config, seed=1, z0_loss="mse", workers=7, batch=1, accumulate=4)
    with pytest.raises(
        InputError, match="z0_loss 'mse', was 'sobel'; seed 1, was 0; samples of a step 4, was 2"
    ):
        found(changed, samples=4)
    with pytest.raises(InputError, match="the samples are others"):
        found(config, data="other")
    said = []
    assert found(dataclasses.replace(changed, force_resume=True), said, data="other") is not None
    assert "resuming although settings have changed" in said[0]


@pytest.mark.parametrize(("schedule", "free"), [("constant", True), ("cosine", False)])
def test_more_steps_are_the_same_run_where_the_rate_does_not_depend_on_them(
    schedule, free, adapter, tmp_path
):
    _, config, _ = saved(adapter, tmp_path, lr_schedule=schedule)
    assert bool(dataclasses.replace(config, steps=99).changed(config)) is not free


def test_configuration_beside_the_weights_reads_back(adapter, tmp_path):
    path, config, _ = saved(adapter, tmp_path, mask_shapes=("box", "circle"))
    assert TrainConfig.read(path / RUN) == config
    assert {"step", "config", "versions", "commit"} <= json.loads((path / RUN).read_text()).keys()
