"""training.train_adapter: the command line, from bad input to a run that is killed and goes on."""

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import T2IAdapter
from PIL import Image
from safetensors.torch import load_file

from runtime import LocalControlPipeline, Region
from runtime.control.conditions import DEPTH_MODEL_VARIABLE
from runtime.errors import InputError
from runtime.machine.arithmetic import DTYPES
from tests.support import cpus, saved_model
from tests.support.depth_model import save_depth_model
from tests.support.processes import ON_TWO, run
from tests.support.tiny import make_adapter
from tests.support.training_runs import command, make_scenes, train
from training.config import PRESETS, TrainConfig, with_preset
from training.loop.checkpoint import WEIGHTS, describe, newest
from training.train_adapter import load, make_parser, with_dtype

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert train(scenes, out) == 0
    return out


def same_weights(a, b):
    a, b = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_setting_is_an_option():
    options = {o for action in make_parser()._actions for o in action.option_strings}
    assert {"--" + name.replace("_", "-") for name in TrainConfig.__dataclass_fields__} <= options


def test_what_the_model_predicts_may_be_said():
    options = make_parser().parse_args(["--prediction-type", "v_prediction"])
    for given in ({}, vars(options)):
        config = TrainConfig(model=str(saved_model.folder()), dtype="fp32", **given)
        _, model, _ = load(config, Accelerator(cpu=True))
        assert model.scheduler.config.prediction_type == given.get("prediction_type", "epsilon")
    with pytest.raises(InputError, match="prediction_type 'v': expected epsilon or v_prediction"):
        TrainConfig(prediction_type="v")


@pytest.mark.parametrize(("condition", "channels"), [("color", 1), ("color", 3), ("canny", 1)])
def test_an_adapter_that_sees_colours_as_grey_is_warned_of(condition, channels, tmp_path):
    make_adapter(in_channels=channels).save_pretrained(tmp_path)
    config = TrainConfig(
        model=str(saved_model.folder()), dtype="fp32", adapter=str(tmp_path), condition=condition
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(config, Accelerator(cpu=True))
    grey = [str(w.message) for w in said if "grey" in str(w.message)]
    expected = f"condition color: adapter {tmp_path} of 1 channel sees its colours as grey"
    assert grey == ([expected] if (condition, channels) == ("color", 1) else [])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_latents_come_from_the_vae_as_its_file_has_it(dtype):
    """Not from one rounded to the data type of the UNet and back."""
    config = TrainConfig(model=str(saved_model.folder()), dtype=dtype)
    _, model, _ = load(config, Accelerator(cpu=True))
    expected = saved_model.pipeline().vae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.vae.state_dict().items())
    assert model.unet.conv_in.weight.dtype == DTYPES[dtype]


def test_options_given_by_hand_win_over_the_preset(scenes, tmp_path):
    assert train(scenes, tmp_path, "--preset=paper", "--steps=1", "--batch=2", "--accumulate=1") == 0
    config = TrainConfig.read(tmp_path / "training.json")
    assert (config.steps, config.batch, config.mask_resize, config.scale_lr) == (1, 2, "nearest", True)


@pytest.mark.parametrize("kind", cpus.KINDS, ids=lambda kind: kind.name)
def test_arithmetic_is_in_bf16_only_where_the_cpu_is_quick_in_it(kind, tmp_path, monkeypatch):
    cpus.pretend(kind, monkeypatch)
    config = with_preset("masked-sobel", {"out": str(tmp_path)})
    assert with_dtype(config).dtype == ("bf16" if kind.bf16 else "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_keeps_its_arithmetic_on_another_cpu(dtype, tmp_path, monkeypatch):
    cpus.pretend(next(kind for kind in cpus.KINDS if kind.bf16 == (dtype == "fp32")), monkeypatch)
    config = TrainConfig(out=str(tmp_path))
    checkpoint = tmp_path / "checkpoints" / "00000002"
    checkpoint.mkdir(parents=True)
    text = describe(dataclasses.replace(config, dtype=dtype), 2)
    (checkpoint / "training.json").write_text(text, "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a CPU that is slow in bf16
        assert with_dtype(config).dtype == dtype
        assert with_dtype(dataclasses.replace(config, resume=str(checkpoint))).dtype == dtype
    assert with_dtype(dataclasses.replace(config, resume="never")).dtype != dtype


def test_result_loads_in_diffusers_and_draws_in_the_pipeline(finished):
    adapter = T2IAdapter.from_pretrained(finished)
    assert adapter.config.adapter_type == "full_adapter_xl" and adapter.config.in_channels == 1
    pipe = LocalControlPipeline.from_pretrained("embedded", {"mine": str(finished)})
    region = Region(Image.new("L", (128, 128)), adapter="mine")
    assert pipe("a red star", [region], steps=2, seed=0).images[0].size == (128, 128)


def test_interrupted_run_goes_on_to_the_same_bits(scenes, finished, tmp_path, monkeypatch):
    from training.loop.trainer import Trainer

    step = Trainer._take_step

    def stop_after_three(self, batches):
        terms = step(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms

    monkeypatch.setattr(Trainer, "_take_step", stop_after_three)
    assert train(scenes, tmp_path) == 128 + signal.SIGTERM
    assert newest(tmp_path)[-1].name == "00000003" and not (tmp_path / WEIGHTS).exists()
    monkeypatch.setattr(Trainer, "_take_step", step)
    assert train(scenes, tmp_path) == 0
    assert same_weights(tmp_path, finished)


def killed_runs(scenes, out, kills, steps, seed=0):
    """Kill a run `kills` times at random moments of its training; return how often it was not yet done."""
    rng = random.Random(seed)
    arguments = command(scenes, out, f"--steps={steps}", "--workers=1")
    call = [sys.executable, "-m", "training.train_adapter", *arguments]
    for killed in range(kills):
        with subprocess.Popen(
            call, env=ONE_THREAD, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as run:
            _wait_for(run.stdout, b"training:")
            try:
                run.wait(rng.uniform(0, 2.0))
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
            run.stdout.read()
        if run.returncode == 0:
            return killed
    return kills


def _wait_for(stream, text):
    seen = b""
    while text not in seen:
        byte = stream.read(1)
        assert byte, seen.decode()
        seen += byte


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_run_goes_on_to_the_same_bits(kills, scenes, tmp_path):
    steps, threads = 12 * kills + 12, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train(scenes, tmp_path / "whole", f"--steps={steps}") == 0
        assert killed_runs(scenes, tmp_path / "killed", kills, steps) > 0
        assert train(scenes, tmp_path / "killed", f"--steps={steps}") == 0
    finally:
        torch.set_num_threads(threads)
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.part"))


def test_two_processes_take_the_steps_of_one_with_the_whole_batch(scenes, tmp_path):
    """And prepare a cache of their own together; one runs out of memory in the second half of a step."""
    options = f"--cache={tmp_path / 'cache'}", "--steps=4", "--ema=0"
    parts = "--batch=1", "--accumulate=2"
    call = [*ON_TWO, "tests.support.short_of_memory", *command(scenes, tmp_path / "two", *options, *parts)]
    done = run(call, 200, {**ONE_THREAD, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out of memory: recomputing activations from now on") == 1
    assert train(scenes, tmp_path / "one", *options, "--batch=4") == 0
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    for name in one:  # float32 sums in another order, through four steps of Adam
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_go_on_where_they_were(scenes, tmp_path):
    environment = {**ONE_THREAD, "ACCELERATE_USE_CPU": "true"}

    def call(name):
        options = "--steps=16", "--batch=1", "--accumulate=1", "--ema=0"
        return [*ON_TWO, "training.train_adapter", *command(scenes, tmp_path / name, *options)]

    def finish(name):
        done = run(call(name), 200, environment)
        assert done.returncode == 0, done.stderr

    finish("whole")
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(call("killed"), env=environment, start_new_session=True, **output) as launcher:
        _wait_for(launcher.stdout, b"training:")
        while not newest(tmp_path / "killed") and launcher.poll() is None:
            time.sleep(0.01)
        workers = [
            w
            for w in psutil.Process(launcher.pid).children(recursive=True)
            if "training.train_adapter" in w.cmdline()
        ]
        assert len(workers) == 2
        workers[1].kill()
        launcher.stdout.read()
    assert launcher.returncode != 0  # the launcher has ended the other one too
    finish("killed")
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data="], "data: not given"),
        (["--data=nowhere"], "data nowhere: no such folder"),
        (["--preset=nope"], "preset 'nope' is unknown"),
        (["--steps=-1"], "steps -1: expected 1 or more"),
        (["--batch=0"], "batch 0: expected 1 or more"),
        (["--lr=0"], "lr 0.0: expected more than 0"),
        (["--condition=nope"], "condition 'nope': expected one of"),
        (["--dtype=fp16"], "dtype fp16: a CPU trains in fp32 or bf16"),
        (["--model=nowhere"], "model nowhere: no such file or folder"),
        (["--adapter=nowhere"], "adapter nowhere: not found"),
        (["--flip"], "flip: mirrors every second crop"),
        (["--mask-from=nowhere"], "nowhere: no such folder"),
        (["--validation-samples=14"], "validation_samples 14: there are only 14 samples"),
        (["--resume=nowhere"], "checkpoint nowhere: cannot be read"),
        (["--optimizer=adamw8bit"], "optimizer adamw8bit: needs the package bitsandbytes"),
    ],
)
def test_bad_input_is_one_line(options, said, scenes, tmp_path, capsys):
    assert train(scenes, tmp_path / "out", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out" / WEIGHTS).exists() and newest(tmp_path / "out") == []


def test_adapter_of_other_channels_is_refused(scenes, tmp_path, capsys):
    make_adapter().save_pretrained(tmp_path / "other")
    assert train(scenes, tmp_path / "out", f"--adapter={tmp_path / 'other'}") == 2
    assert "the UNet expects (64, 96, 112, 112)" in capsys.readouterr().err


def test_folder_that_cannot_be_written_is_refused(scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train(scenes, tmp_path / "file" / "out") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_weights_that_no_run_wrote_are_not_replaced(scenes, tmp_path, capsys):
    make_adapter().save_pretrained(tmp_path / "other")
    before = (tmp_path / "other" / WEIGHTS).read_bytes()
    assert train(scenes, tmp_path / "other") == 2
    assert "has weights that no run of this wrote; expected another folder" in capsys.readouterr().err
    for start in (tmp_path / "other", tmp_path / "other" / WEIGHTS):
        assert train(scenes, tmp_path / "other", f"--adapter={start}") == 2
        assert "the start, --adapter, is in it" in capsys.readouterr().err
    assert (tmp_path / "other" / WEIGHTS).read_bytes() == before
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resume=nowhere"], "checkpoint nowhere: cannot be read: no training.json in it"),
        (["--optimizer=adamw8bit"], "needs the package bitsandbytes"),
        (["--cache={file}/cache"], "cache {file}/cache: cannot be written"),
        (["--noise-weight=0", "--z0-loss=off"], "noise_weight 0 without a z0 loss"),
    ],
)
def test_what_can_be_known_at_once_is_said_before_the_model_loads(
    options, said, scenes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("training.train_adapter.load_model", None)
    (tmp_path / "file").write_text("in the way")
    options = [option.format(file=tmp_path / "file") for option in options]
    assert train(scenes, tmp_path / "out", *options) == 2
    assert said.format(file=tmp_path / "file") in capsys.readouterr().err


def test_missing_data_leaves_no_folder(tmp_path):
    assert train(tmp_path / "nowhere", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_changed_settings_are_named_and_can_be_forced(scenes, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    assert train(scenes, tmp_path / "out", "--z0-weight=0.5", "--save-every=3") == 2
    said = capsys.readouterr().err
    assert "settings have changed: z0_weight 0.5, was 0.1;" in said and "save_every" not in said
    assert train(scenes, tmp_path / "out", "--z0-weight=0.5", "--steps=7", "--force-resume") == 0
    assert newest(tmp_path / "out")[-1].name == "00000007"


def test_other_samples_or_batches_are_another_run(scenes, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    assert train(scenes, tmp_path / "out", "--batch=4", "--steps=8") == 2
    assert "samples of a step 4, was 2" in capsys.readouterr().err
    shutil.copytree(scenes, tmp_path / "scenes")
    next((tmp_path / "scenes").glob("*.png")).unlink()
    assert train(tmp_path / "scenes", tmp_path / "out", "--steps=8") == 2
    assert "the samples are others" in capsys.readouterr().err


def test_another_depth_model_is_another_run(scenes, tmp_path, monkeypatch, capsys):
    codes = []
    for seed in range(2):
        model = save_depth_model(tmp_path / f"depth-{seed}", seed)
        monkeypatch.setenv(DEPTH_MODEL_VARIABLE, str(model))
        codes.append(train(scenes, tmp_path / "out", "--condition=depth", f"--steps={3 + seed}"))
    said = capsys.readouterr().err
    if "needs another package" in said:  # transformers 5.17 wants torchvision for depth
        pytest.skip(said)
    assert codes == [0, 2] and "the samples are others, or the depth model" in said


@pytest.mark.parametrize(
    "other", ["--adapter-blocks=2", "--condition-channels=3", "--control=controlnet"], ids=lambda o: o[2:]
)
def test_another_network_cannot_be_forced(other, scenes, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    assert train(scenes, tmp_path / "out", other, "--steps=8", "--force-resume") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "it trained another network: " in lines[0]
    assert same_weights(finished, tmp_path / "out")


def test_home_in_an_options_value_is_the_same_folder(scenes, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train(scenes, "~/out", "--steps=2") == 0
    assert train(scenes, "~/out", "--steps=3") == 0
    assert "resuming at step 2" in "".join(capfd.readouterr())
    assert train(scenes, "~/other", "--steps=3", "--resume=~/out/checkpoints/00000002") == 0
    assert [path.name for path in newest(tmp_path / "out")] == ["00000002", "00000003"]
    assert not (tmp_path / "~").exists()


def test_another_model_in_the_place_of_the_first_is_another_run(scenes, tmp_path, capsys):
    model = saved_model.copy_folder(tmp_path)
    options = f"--model={model}", "--bucket-step=16"
    assert train(scenes, tmp_path / "out", *options, "--steps=1") == 0
    assert train(scenes, tmp_path / "out", *options, "--steps=2") == 0
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    saved_model.edit_tensors(weights, lambda tensors: tensors["conv_in.bias"].add_(1))
    assert train(scenes, tmp_path / "out", *options, "--steps=3") == 2
    assert "settings have changed: the model's weights are others;" in capsys.readouterr().err
    assert train(scenes, tmp_path / "out", *options, "--steps=3", "--force-resume") == 0


def test_never_resuming_does_not_overwrite(scenes, finished, capsys):
    assert train(scenes, finished, "--resume=never") == 2
    assert "has checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_the_options_that_the_help_shows_for_a_preset_are_the_preset(name):
    parser = make_parser()
    shown = parser.format_help().partition("presets, ")[2]
    (options,) = re.findall(rf"^  {name}: (.*(?:\n    .*)*)", shown, re.M)
    assert vars(parser.parse_args(options.split())) == PRESETS[name]
