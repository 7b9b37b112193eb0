"""training.loop.trainer: what happens in a run when something goes wrong, and when nothing does."""

import dataclasses
import errno
import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from runtime.control.conditions import preprocess
from runtime.loading.adapter import EMBEDDED
from runtime.machine.lock import locked
from tests.support.training_runs import make_scenes, train
from training.config import TrainConfig
from training.loop import checkpoint, trainer
from training.loop.checkpoint import WEIGHTS, newest
from training.loop.step import LossOf
from training.loop.validate import compare
from training.metrics import lfmse_canny, lfmse_sobel


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


def spoiled(monkeypatch, when):
    """Losses that are NaN in the calls that `when` names; returns the number of calls so far."""
    calls, right = [], LossOf.terms

    def call(self, features, batch):
        calls.append(0)
        terms = right(self, features, batch)
        return {k: v * float("nan") for k, v in terms.items()} if len(calls) in when else terms

    monkeypatch.setattr(LossOf, "terms", call)
    return calls


def noise_losses(monkeypatch, scenes, out, *options):
    seen, right = [], trainer.Progress.update

    def update(self, step, terms, lr):
        seen.append(float(terms["noise"]))
        right(self, step, terms, lr)

    monkeypatch.setattr(trainer.Progress, "update", update)
    assert train(scenes, out, "--batch=8", "--save-every=99", *options) == 0
    monkeypatch.setattr(trainer.Progress, "update", right)
    return seen


def test_losses_fall(scenes, tmp_path, monkeypatch):
    """Against the same samples, noise and timesteps without learning."""
    still, learning = (
        noise_losses(monkeypatch, scenes, tmp_path / lr, "--steps=24", f"--lr={lr}", "--control=everywhere")
        for lr in ("1e-12", "2e-3")
    )
    assert sum(learning[16:]) < 0.98 * sum(still[16:])


def test_training_can_go_on_from_an_adapter(scenes, tmp_path, monkeypatch):
    new = noise_losses(monkeypatch, scenes, tmp_path / "new", "--lr=1e-12")
    known = noise_losses(
        monkeypatch, scenes, tmp_path / "known", "--lr=1e-12", f"--adapter={EMBEDDED / 'canny'}"
    )
    assert sum(known) < sum(new)


def test_accumulated_batches_are_one_large_batch(scenes, tmp_path):
    assert train(scenes, tmp_path / "whole", "--batch=4", "--ema=0") == 0
    assert train(scenes, tmp_path / "parts", "--batch=2", "--accumulate=2", "--ema=0") == 0
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    for name in whole:  # float32 sums in another order, through six steps of Adam
        assert torch.allclose(whole[name], parts[name], rtol=1e-3, atol=1e-5), name


def test_step_without_a_finite_loss_is_skipped(scenes, tmp_path, monkeypatch, capsys):
    spoiled(monkeypatch, when={2})
    assert train(scenes, tmp_path, "--steps=3", "--save-every=1", "--ema=0") == 0
    first, second, _ = (load_file(path / "adapter" / WEIGHTS) for path in newest(tmp_path))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert "step 2: loss or gradient not finite; step skipped" in capsys.readouterr().out


def test_run_whose_last_steps_were_skipped_says_so(scenes, tmp_path, monkeypatch, capsys):
    spoiled(monkeypatch, when={3, 4})
    assert train(scenes, tmp_path, "--steps=4") == 1
    said = "the last 2 of 4 steps had no finite gradient and were skipped"
    assert said in capsys.readouterr().err and (tmp_path / WEIGHTS).exists()


def test_one_run_at_a_time_trains_in_a_folder(scenes, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    with locked(tmp_path / ".lock", "busy"):
        assert train(scenes, tmp_path) == 2
    said = f"out {tmp_path}: in use (process {os.getpid()} on {socket.gethostname()}); wait for its end"
    assert said in capsys.readouterr().err
    assert not newest(tmp_path)


def test_run_without_finite_losses_stops(scenes, tmp_path, monkeypatch, capsys):
    calls = spoiled(monkeypatch, when=range(4, 100))
    assert train(scenes, tmp_path, "--steps=50", "--nan-limit=3") == 2
    assert len(calls) == 6 and "3 steps in a row without a finite gradient" in capsys.readouterr().err
    assert all(t.isfinite().all() for t in load_file(newest(tmp_path)[-1] / "adapter" / WEIGHTS).values())


def short_of_memory(monkeypatch, room, with_checkpointing):
    """A device where `room` samples fit, or `with_checkpointing` where activations are recomputed."""
    right = LossOf.terms

    def call(self, features, batch):
        if len(batch["t"]) > (with_checkpointing if self.unet.checkpointing else room):
            raise torch.OutOfMemoryError("no memory")
        return right(self, features, batch)

    monkeypatch.setattr(LossOf, "terms", call)


def test_activations_are_recomputed_where_memory_runs_out(scenes, tmp_path, monkeypatch, capsys):
    short_of_memory(monkeypatch, room=1, with_checkpointing=2)
    assert train(scenes, tmp_path, "--steps=2") == 0
    assert capsys.readouterr().out.count("recomputing activations from now on") == 1


def test_batch_that_is_too_large_is_told_the_largest_that_fits(scenes, tmp_path, monkeypatch, capsys):
    short_of_memory(monkeypatch, room=1, with_checkpointing=3)
    assert train(scenes, tmp_path, "--batch=8") == 2
    assert "batch 8: out of memory; the largest that fits is 3" in capsys.readouterr().err


def test_full_disk_keeps_the_last_checkpoint(scenes, tmp_path, monkeypatch, capsys):
    right, files = checkpoint.save_file, []

    def fill(tensors, path, *more, **options):
        files.append(path)
        if len(files) > 4:  # adapter, average and optimizer of step 2, and the adapter of step 4
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        right(tensors, path, *more, **options)

    monkeypatch.setattr(checkpoint, "save_file", fill)
    assert train(scenes, tmp_path) == 2
    assert "No space left on device; the last checkpoint is" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "save_file", right)
    assert [path.name for path in newest(tmp_path)] == ["00000002"]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    assert train(scenes, tmp_path) == 0


def test_full_disk_under_the_logs_is_one_line(scenes, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fill)
    assert train(scenes, tmp_path, "--tracker=tensorboard") == 2
    said = capsys.readouterr().err
    assert "cannot go on: [Errno 28] No space left on device; the same command goes on from" in said
    monkeypatch.undo()
    assert train(scenes, tmp_path, "--tracker=tensorboard") == 0


def test_sheets_and_lfmse_while_it_trains(scenes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = "--validate-every=3", "--validation-steps=2", "--tracker=tensorboard"
    assert train(scenes, tmp_path, *options) == 0
    sheets = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert sheets == ["00000003.png", "00000006.png"]
    with Image.open(tmp_path / "validation" / sheets[0]) as sheet:
        assert sheet.width > 900 and sheet.height > 600  # two rows of four panels
    log = EventAccumulator(str(tmp_path / "logs"))
    log.Reload()
    lfmse = {f"lfmse/{name}" for name in ("inside", "outside", "total", "outside_wanted")}
    assert {"loss/noise", "loss/z0", "lr"} | lfmse <= set(log.Tags()["scalars"])


@pytest.mark.parametrize(
    ("condition", "lfmse"), [("canny", lfmse_canny), ("sobel", lfmse_sobel), ("sketch", lfmse_canny)]
)
def test_a_picture_is_compared_by_its_own_condition(condition, lfmse):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    made = np.asarray(preprocess(condition, image).convert("L"))
    wanted, mask = np.roll(made, 9, axis=1), np.zeros((64, 96), np.float32)
    mask[:, :40] = 1
    tensors = torch.from_numpy(wanted)[None] / 255, torch.from_numpy(mask)[None]
    assert compare(image, *tensors, TrainConfig(condition=condition)) == lfmse(made, wanted, mask)


def test_config_is_kept_whole(scenes, tmp_path):
    assert train(scenes, tmp_path, "--steps=1") == 0
    config = trainer.TrainConfig.read(tmp_path / "training.json")
    assert dataclasses.asdict(config)["steps"] == 1 and config.resolution == 128
