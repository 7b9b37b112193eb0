"""python -m training.train_adapter --data photos --out my-adapter [--preset masked-sobel] [--model ...]

Fine-tunes a T2I-Adapter, or a ControlNet (--control controlnet), for control inside masks; runs under
`accelerate launch` too.
"""

from __future__ import annotations

# isort: off
import runtime.cli.interrupt  # noqa: F401 -- before the seconds that the other imports take
# isort: on

import argparse
import dataclasses
import importlib.util
import os
import shutil
import sys
import tempfile
import textwrap
import time
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before its import: it tells of parts not used here

import torch
from accelerate import Accelerator
from torch import nn

from runtime.cli.command import Parser, exit_code, say
from runtime.errors import InputError
from runtime.loading.load import Model, load_model
from runtime.machine.arithmetic import DTYPES, half_precision, name_of, warn_if_slow
from runtime.machine.files import clear_partials, expand, size_of
from runtime.machine.lock import locked
from training.config import PRESETS, TrainConfig, typed, with_preset
from training.data.prepare import prepare
from training.data.sample import Source
from training.data.sources import open_source
from training.data.stores import Stores
from training.heeded import check_heeded, warn_of_grey
from training.loop import checkpoint
from training.loop.controls import condition_channels, new_control
from training.loop.loss import check_schedule, schedule_of
from training.loop.optimize import check_optimizer
from training.loop.trainer import NotFinite, Stopped, Trainer

WEIGHTS_OF_OTHERS = ("diffusion_pytorch_model*", "config.json", "model_index.json")
LET_GO = 0.2  # seconds
GROUPS = {  # the first option of each
    "data": "what is trained, on what",
    "caption_key": "data",
    "control": "method",
    "steps": "optimisation",
    "dtype": "arithmetic",
    "seed": "the run",
}


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 where the last steps were skipped; 2 for bad input; 128 + a signal's number.

    All but 0 say why in one line on stderr.
    """
    given = vars(make_parser().parse_args(arguments))
    try:
        return exit_code(lambda: train(with_preset(given.pop("preset", "masked-sobel"), given)))
    except Stopped as stopped:
        say(str(stopped))
        return 128 + stopped.number
    except NotFinite as error:
        say(str(error))
        return 1


def train(config: TrainConfig) -> None:
    """Train, as the one run in its folder."""
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise InputError(
            f"tracker {config.tracker}: its package is not installed; pip install {config.tracker}, or --tracker none"
        )
    check_heeded(config)
    check_optimizer(config)
    out = check_out(config)
    # as every reader of the configuration is to see them: a shell leaves the ~ of --out=~/run as it is
    config = dataclasses.replace(config, out=str(out), resume=str(expand(config.resume, "resume")))
    checkpoint.check_resume(config)
    source = open_source(config)  # first: a mistyped --data leaves no folder
    make_folder(checkpoint.checkpoints(out), "out", out)
    if config.cache and not config.require_cache:  # a whole one may be read-only
        make_folder(expand(config.cache), "cache", expand(config.cache))
    try:
        if int(os.environ.get("RANK", "0")):  # of the run that holds the folder
            return train_in(out, source, config)
        with locked(out / ".lock", f"out {out}: in use"):
            clear_partials(out, checkpoint.checkpoints(out))
            return train_in(out, source, config)
    except OSError as error:  # a disk that is full or gone, as the tracker notices it, or a list
        last = checkpoint.newest(out)
        kept = f"the same command goes on from {last[-1]}" if last else "there is no checkpoint"
        raise InputError(f"out {out}: cannot go on: {error}; {kept}") from error


def train_in(out: Path, source: Source, config: TrainConfig) -> None:
    """Check, load, prepare, train."""
    config = with_dtype(config)
    # accelerate's word is for its gradient scaler; the arithmetic's dtype is our own
    mixed = "fp16" if config.dtype == "fp16" else "no"
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulate,
        mixed_precision=mixed,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=out,
    )
    check_launch(accelerator)
    torch.manual_seed(config.seed)  # a new adapter's weights
    config, model, adapter = load(config, accelerator)
    check_disk(out, adapter)
    folder = expand(config.cache) if config.cache else out / "cache"
    stores = Stores.open(folder, config, model)
    for store in stores.all():
        if store.discarded:
            accelerator.print(f"cache: {store.discarded} damaged shards of {store.folder} are made again")
    entries = prepare(source, stores, folder, model, config, accelerator)
    trainer = Trainer(config, accelerator, model, adapter, entries, stores)
    if accelerator.device.type == "cuda":
        trainer.offload()
    if config.tracker != "none":
        settings = {k: v if isinstance(v, (int, float)) else str(v) for k, v in config.to_json().items()}
        accelerator.init_trackers("logs", config=settings)
    try:
        trainer.run()
    finally:
        end(accelerator)
    accelerator.print(f"the adapter is in {out}: python -m runtime.generate --adapter NAME={out} ...")


def end(accelerator: Accelerator) -> None:
    """Leave the group of processes.

    The threads of gloo, which joins processes on CPUs, need the interpreter's lock to let go of tensors. The group's
    end holds it, and waits for them: they are given it before. Otherwise a run hung now and then when it was done.
    """
    if accelerator.num_processes > 1:
        time.sleep(LET_GO)
    accelerator.end_training()


def with_dtype(config: TrainConfig) -> TrainConfig:
    """Return the configuration with a data type in place of "auto": the resumed run's, or what is quick here.

    Raises InputError for fp16 on a CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.dtype == "auto":
        found = checkpoint.dtype_of_run(config) or name_of(half_precision(device))
        config = dataclasses.replace(config, dtype=found)
    if config.dtype == "fp16" and device.type == "cpu":
        raise InputError("dtype fp16: a CPU trains in fp32 or bf16; use --dtype auto")
    warn_if_slow(DTYPES[config.dtype], device)
    return config


def check_launch(accelerator: Accelerator) -> None:
    """Raise InputError where the processes that were launched would not train together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"launched as {launched} processes, of which accelerate sees {accelerator.num_processes}: its "
            "configuration does not fit (FSDP needs GPUs; on CPUs use torchrun with ACCELERATE_USE_CPU=true)"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise InputError("accelerate's configuration has fsdp_version 1; expected fsdp_version: 2")


def load(config: TrainConfig, accelerator: Accelerator) -> tuple[TrainConfig, Model, nn.Module]:
    """Return the frozen model and the adapter to train; and the configuration, its resolution filled in from the
    model's.
    """
    device = accelerator.device
    # latents are cached once: in full precision, as diffusers' trainer encodes them
    full = {"vae": config.vae, "vae_dtype": torch.float32, "prediction_type": config.prediction_type}
    model = load_model(config.model, device=device, dtype=DTYPES[config.dtype], **full)
    # known before hours of encoding
    check_schedule(schedule_of(model.scheduler), model.scheduler.config.prediction_type, config)
    adapter = new_control(config, model)
    warn_of_grey(config, condition_channels(adapter))
    step = min(config.bucket_step, config.resolution or model.sample_size * 8)
    config = dataclasses.replace(
        config, resolution=config.resolution or model.sample_size * 8, bucket_step=step
    )
    return config, model, adapter


def check_out(config: TrainConfig) -> Path:
    """Return the output folder. Raises InputError where the finished adapter would replace what no run wrote."""
    if not config.out:
        raise InputError("out: not given; expected the folder of the adapter to be")
    out = expand(config.out)
    try:
        start = expand(config.adapter).resolve()
        if config.adapter != "new" and out.resolve() in (start, start.parent):
            raise InputError(f"out {out}: the start, --adapter, is in it; expected another folder")
        foreign = any(found for name in WEIGHTS_OF_OTHERS for found in out.glob(name))
        if foreign and not (out / checkpoint.RUN).exists() and not checkpoint.newest(out):
            raise InputError(f"out {out}: has weights that no run of this wrote; expected another folder")
    except (OSError, RuntimeError) as error:
        raise InputError(f"out {out}: cannot be read: {error}; expected another folder") from error
    return out


def make_folder(folder: Path, name: str, named: Path) -> None:
    """Make a folder in, or as, the one that an option names; InputError where that one cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=named, prefix="."):  # of each process its own
            pass
    except OSError as error:
        raise InputError(f"{name} {named}: cannot be written: {error.strerror or error}") from error


def check_disk(out: Path, adapter: nn.Module) -> None:
    """Raise InputError where there is no room for a checkpoint beside the last one: weights, average, two moments."""
    needed = 4 * sum(p.numel() * 4 for p in adapter.parameters())
    free = shutil.disk_usage(out).free
    if free < 2 * needed:
        raise InputError(f"out {out}: {size_of(free)} free; expected {size_of(2 * needed)} for checkpoints")


def given_by_hand(settings: Mapping[str, Any]) -> str:
    """Return settings as the options that say the same."""
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {typed(value)}")
    return " ".join(words)


def make_parser() -> argparse.ArgumentParser:
    """Return an option for every field of TrainConfig; those not given are absent from the result."""
    presets = (
        textwrap.fill(
            f"{name}: {given_by_hand(preset)}",
            78,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for name, preset in PRESETS.items()
    )
    parser = Parser(
        prog="python -m training.train_adapter",
        usage="%(prog)s --data FOLDER --out FOLDER [options]",
        description=__doc__.split("\n\n", 1)[1],
        epilog="presets, and the options that they stand for:\n" + "\n".join(presets),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    types_of, group = typing.get_type_hints(TrainConfig), parser
    for field in dataclasses.fields(TrainConfig):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        add_option(group, field, types_of[field.name])
    return parser


def add_option(parser, field: dataclasses.Field, kind: object) -> None:
    name, meta = "--" + field.name.replace("_", "-"), dict(field.metadata)
    default = "none" if field.default is None else field.default
    default = typed(default)
    meta["help"] = (
        f"{meta['help']} (default: {default})".replace("%", "%%") if default != "" else meta["help"]
    )
    if kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=meta["help"])
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(
            name, type=lambda text: tuple(text.split(",")), metavar="A,B,...", help=meta["help"]
        )
    else:
        if isinstance(kind, types.UnionType):
            kind = str
        parser.add_argument(
            name, type=kind, metavar=None if "choices" in meta else name.split("-")[-1].upper(), **meta
        )


if __name__ == "__main__":
    sys.exit(main())
