"""Checkpoints: the whole state of a run, written whole or not at all.

`OUT/checkpoints/00000500/` has adapter/ and ema/ (diffusers' layout: `runtime.generate --adapter` loads either),
optimizer.safetensors and training.json. Randomness is not part of the state: it follows from the seed and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffusers import ControlNetModel, T2IAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.errors import InputError
from runtime.machine.files import new_folder, replacing, sha256
from runtime.machine.report import commit, versions
from training.config import TrainConfig
from training.loop.controls import trains_controlnet
from training.loop.learner import Learned

WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RUN = "training.json"


@dataclass
class State:
    """A run after `step` steps.

    samples: of a step, over all processes. data: a digest of the samples trained on, and of the depth model that saw
    them. With both, `step` says which ones come next. model: a digest of the frozen model's weights, "" where it was
    not noted.
    """

    step: int
    learned: Learned
    samples: int
    data: str
    model: str = ""


def save(state: State, config: TrainConfig, adapter_config: Mapping, keep: int) -> Path:
    """Write a checkpoint and remove all but the last `keep`. InputError where the disk does not take it."""
    folder = checkpoints(config.out) / f"{state.step:08d}"
    try:
        # a run that is stopped as soon as it goes on writes the step that it came from again
        with new_folder(folder, replace=True) as partial:
            save_control(partial / "adapter", state.learned.weights, adapter_config, config)
            if state.learned.average:
                save_control(partial / "ema", state.learned.average, adapter_config, config)
            save_file(dict(state.learned.optimizer), partial / OPTIMIZER)
            files = {name: sha256(partial / name) for name in _files(partial)}
            of_run = {
                "samples_of_step": state.samples,
                "data_digest": state.data,
                "model_digest": state.model,
                "number": 1 + max((number for number, _ in _numbered(config.out)), default=0),
            }
            (partial / RUN).write_text(describe(config, state.step, **of_run, files=files), "utf-8")
    except (OSError, SafetensorError) as error:
        last = newest(config.out)
        kept = f"the last checkpoint is {last[-1]}" if last else "there is no checkpoint"
        raise InputError(f"cannot write the checkpoint {folder}: {error}; {kept}") from error
    for old in newest(config.out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def save_result(
    weights: Mapping[str, Tensor], config: TrainConfig, adapter_config: Mapping, step: int
) -> None:
    """Write the finished adapter to the run's folder. Raises InputError where the disk does not take it."""
    out = Path(config.out)
    try:
        save_control(out, weights, adapter_config, config)
        with replacing(out / RUN) as partial:
            partial.write_text(describe(config, step), "utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write the adapter to {out}: {error}; it is in its last checkpoint"
        ) from error


def save_control(folder: Path, weights: Mapping[str, Tensor], options: Mapping, config: TrainConfig) -> None:
    """Write a T2I-Adapter or a ControlNet in diffusers' layout; a file that is there is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as partial:
        save_file(dict(weights), partial, metadata={"format": "pt"})
    kind = ControlNetModel if trains_controlnet(config) else T2IAdapter
    text = json.dumps({"_class_name": kind.__name__, **options}, indent=2)
    with replacing(folder / "config.json") as partial:
        partial.write_text(text + "\n", "utf-8")


def describe(config: TrainConfig, step: int, **more) -> str:
    """Return the run's full configuration as JSON."""
    about = {"step": step, **more, "config": config.to_json(), "versions": versions(), "commit": commit()}
    return json.dumps(about, indent=2) + "\n"


def checkpoints(out: str | Path) -> Path:
    return Path(out) / "checkpoints"


def newest(out: str | Path) -> list[Path]:
    """Return the whole checkpoints of a run, the one written last at the end.

    That is not always the one of most steps: a run that was sent back to an earlier one goes on from there.
    """
    return [path for _, path in _numbered(out)]


def _numbered(out: str | Path) -> list[tuple[int, Path]]:
    """Return the whole checkpoints of a run in the order in which they were written, each with its number in that.

    0 where an earlier version noted none. One whose notes are damaged stands where its step does.
    """
    found, number = [], 0
    for path in sorted(checkpoints(out).glob(f"[0-9]*/{RUN}")):
        with suppress(OSError, ValueError, TypeError, AttributeError):
            number = int(json.loads(path.read_text("utf-8")).get("number", 0))
        found.append((number, path.parent))
    return sorted(found)


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.safetensors"))


def find(config: TrainConfig, samples: int, data: str, say, model: str = "") -> tuple[Path, State] | None:
    """Return the checkpoint to go on from: the newest that can be read, or the one that `resume` names.

    samples, data, model: of this run, as in State. say: takes lines for the user.

    Raises InputError where that one cannot be read, or where settings have changed and `force_resume` is not given.
    """
    check_resume(config)
    if config.resume == "never":
        return None
    found = _newest_readable(config, say) if config.resume == "auto" else _read(Path(config.resume))
    if found is not None:
        _check_same(*found, config, State(0, found[1].learned, samples, data, model), say)
    return found


def check_resume(config: TrainConfig) -> None:
    """Raise InputError for what can be known to be amiss before the samples are there, see `find`."""
    if config.resume == "never" and newest(config.out):
        raise InputError(f"out {config.out}: has checkpoints; expected another folder, or --resume auto")
    if config.resume not in ("auto", "never") and not (Path(config.resume) / RUN).is_file():
        raise Unreadable(f"checkpoint {config.resume}: cannot be read: no {RUN} in it")


def _newest_readable(config: TrainConfig, say) -> tuple[Path, State] | None:
    for path in reversed(newest(config.out)):
        try:
            return _read(path)
        except Unreadable as error:
            say(f"warning: {error}; trying the one before")
    if newest(config.out):
        raise InputError(f"out {config.out}: none of its checkpoints can be read; start in another folder")
    return None


def dtype_of_run(config: TrainConfig) -> str | None:
    """Return the data type of the run that `config` goes on from; None where it starts one, or cannot tell."""
    named = [] if config.resume == "never" else [Path(config.resume)]
    for path in reversed(newest(config.out)) if config.resume == "auto" else named:
        with suppress(InputError):
            return TrainConfig.read(path / RUN).dtype
    return None


class Unreadable(InputError):
    """A checkpoint that is damaged."""


def _read(path: Path) -> tuple[Path, State]:
    try:
        about = json.loads((path / RUN).read_text("utf-8"))
        if changed := [n for n, digest in about.get("files", {}).items() if sha256(path / n) != digest]:
            raise ValueError(f"{changed[0]} is not what was written")
        ema = path / "ema" / WEIGHTS
        learned = Learned(
            weights=load_file(path / "adapter" / WEIGHTS),
            average=load_file(ema) if ema.exists() else {},
            optimizer=load_file(path / OPTIMIZER),
        )
        return path, State(
            step=int(about["step"]),
            learned=learned,
            samples=int(about["samples_of_step"]),
            data=str(about["data_digest"]),
            model=str(about.get("model_digest", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Unreadable(f"checkpoint {path}: cannot be read: {error}") from error


def _check_same(path: Path, state: State, config: TrainConfig, ours: State, say) -> None:
    """Raise InputError where the run was another one than ours, unless `force_resume` is given."""
    changed = config.changed(TrainConfig.read(path / RUN))
    if state.samples != ours.samples:
        changed.append(f"samples of a step {ours.samples}, was {state.samples}")
    if state.data != ours.data:
        changed.append("the samples are others, or the depth model")
    if state.model and ours.model and state.model != ours.model:
        changed.append("the model's weights are others")
    if changed and not config.force_resume:
        raise InputError(
            f"resume {path}: settings have changed: {'; '.join(changed)}; give the same ones, another --out, or "
            "--force-resume"
        )
    if changed:
        say(f"warning: resuming although settings have changed: {'; '.join(changed)}")
