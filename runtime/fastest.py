"""python -m runtime.fastest --engine FOLDER [FOLDER ...] [--model MODEL] [--adapter NAME=PATH] [--dtype NAME]

Measures a picture of the model on this machine, in PyTorch and on engines that `export.build_engine` made of it, in
turn, and remembers the times: of a picture, and of loading and the first one. From then on `python -m runtime.generate
--backend auto` (its default) takes whatever will have its picture first, loading included, for that model, its adapters
and data type, as long as none of the files has changed and the engine takes the picture's size. The table is
LOCALCONTROL_CACHE/fastest.json, by default in ~/.cache/localcontrol.

Engines that draw something else than PyTorch does are refused.
"""

from __future__ import annotations

# isort: off
import runtime.cli.interrupt  # noqa: F401 -- before the seconds that the other imports take
# isort: on

import argparse
import hashlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.arguments import is_finite_number
from runtime.capabilities import of_manifest
from runtime.cli.command import Parser, exit_code, say
from runtime.cli.sources import adapter_sources
from runtime.engines.manifest import MODEL_FILES, NAME, read_manifest
from runtime.errors import InputError, first_line
from runtime.loading.load import EMBEDDED
from runtime.machine.arithmetic import DTYPES, name_of
from runtime.machine.cache import cache_folder
from runtime.machine.device import pick_device, pick_dtype
from runtime.machine.files import expand, files_below, reason_of, sha256, write_json
from runtime.machine.lock import locked
from runtime.machine.report import device_name

if TYPE_CHECKING:
    from runtime import LocalControlPipeline
    from runtime.sampling.request import Request

PROMPT = "a yellow star and a blue circle at night"
STEPS, TURNS = 10, 3
TABLE = "fastest.json"
TIMES = ("picture_ms", "first_ms", "pixels")  # see `measure`
REMEDY = "remove it, or run runtime.fastest again"
# RMS of the difference to PyTorch's latents over their RMS: what bfloat16's rounding grows to over the steps, or less
LIMITS = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m runtime.fastest", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "--engine", action="extend", nargs="+", required=True, metavar="FOLDER", help="may be repeated"
    )
    parser.add_argument("--model", default="embedded", help="what runtime.generate's --model takes")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="as there")
    parser.add_argument("--dtype", choices=DTYPES, help="as there; engines of this precision take part")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure, compare, remember."""
    from runtime import LocalControlPipeline

    cache = cache_folder()
    adapters = adapter_sources(options.adapter)
    dtype = name_of(pick_dtype(options.dtype, pick_device(None)))
    for folder in options.engine:
        if (precision := read_manifest(folder).precision) != dtype:
            raise InputError(f"engine {folder}: it computes in {precision}, expected {dtype}; see --dtype")
    loads = {"torch": lambda: LocalControlPipeline.from_pretrained(options.model, adapters, dtype=dtype)}
    for folder in options.engine:
        loads[folder] = partial(LocalControlPipeline.from_engine, folder, adapters)
    times = measure(loads, LIMITS[dtype])
    for name, found in sorted(times.items(), key=lambda item: item[1]["picture_ms"]):
        say(
            f"{found['picture_ms']:9.1f} ms a picture, {found['first_ms']:9.1f} ms loading and the first one: {name}"
        )
    own = identity(options.model, adapters, dtype)
    remember(
        {
            "engine": absolute(folder),
            "manifest": manifest_digest(folder),
            **own,
            "times": times[folder],
            "torch_times": times["torch"],
        }
        for folder in options.engine
    )
    say(f"saved {cache / TABLE}")


def remember(entries: Iterable[dict]) -> None:
    """Put entries into the table, in place of those of the same engines; one process at a time.

    Raises InputError where it cannot be written. A table that is broken is written anew, with a warning.
    """
    cache, entries = cache_folder(), list(entries)
    try:
        with locked(cache / ".lock", f"table {cache / TABLE}: in use", wait=60):
            _replace(entries, cache / TABLE)
    except OSError as error:
        raise InputError(f"table: cannot write {cache / TABLE}: {error.strerror or error}") from error


def _replace(entries: list[dict], path: Path) -> None:
    try:
        known = read_table()
    except InputError as error:
        warnings.warn(f"{error}; it is written anew", stacklevel=2)
        known = []
    others = [entry for entry in known if entry["engine"] not in {new["engine"] for new in entries}]
    write_json([*others, *entries], path, "table")


def measure(
    loads: Mapping[str, Callable[[], LocalControlPipeline]], limit: float
) -> dict[str, dict[str, float]]:
    """Return, for each pipeline in turn, the milliseconds of a picture (their median), and of loading and the first
    one.

    InputError where a pipeline's latents are further than `limit` from the first one's.
    """
    pipes, drawn, seconds = {}, {}, {name: [] for name in loads}
    for _ in range(TURNS + 1):
        for name, load in loads.items():
            start = time.perf_counter()
            pipe = pipes[name] = pipes.get(name) or load()
            drawn[name] = draw(pipe)
            seconds[name].append(time.perf_counter() - start)
        check_same(drawn, limit)
    return {
        name: {
            "picture_ms": round(statistics.median(own[1:]) * 1e3, 2),
            "first_ms": round(own[0] * 1e3, 2),
            "pixels": pipes[name].default_size ** 2,
        }
        for name, own in seconds.items()
    }


def draw(pipe: LocalControlPipeline) -> torch.Tensor:
    """Return the latents of a picture of the model's own size with control, where it has an adapter."""
    from runtime import Region

    side = pipe.default_size
    condition = (torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0)) > 0.95).float()
    regions = [Region(condition, adapter=name) for name in sorted(pipe.adapters)[:1]]
    return pipe(PROMPT, regions, height=side, width=side, steps=STEPS, seed=0).latents.cpu()


def check_same(drawn: Mapping[str, torch.Tensor], limit: float) -> None:
    expected = next(iter(drawn.values()))
    for name, latents in drawn.items():
        same_shape = latents.shape == expected.shape
        error = ((latents - expected).norm() / expected.norm()).item() if same_shape else float("inf")
        if not error <= limit:
            raise InputError(
                f"engine {name}: its picture is another than PyTorch's (latents differ by {error:.2g}, expected "
                f"at most {limit:g}): not made from this model and adapter"
            )


def choose(
    model: str, adapters: Mapping[str, str], dtype: str, request: Request
) -> tuple[str, float, float] | None:
    """Return the engine that will have a picture first, in a process that has loaded nothing, of those in the table.

    Its folder, the milliseconds it is expected to take and those of PyTorch; None where PyTorch will be first, or the
    model is another than was measured. Warns of an engine that was measured and is not there as it was, or does not
    take the request; a prompt that is longer than an engine's is left to PyTorch. Raises InputError where the table
    is broken.
    """
    table = read_table()
    fitting, own = (
        [],
        identity(model, adapters, dtype) if table else {},
    )  # it looks at every file of the model
    for entry in table:
        if any(entry[name] != value for name, value in own.items()):
            continue
        try:
            if entry["manifest"] != manifest_digest(entry["engine"]):
                raise InputError("rebuilt since it was measured; run runtime.fastest again")
            of_manifest(read_manifest(entry["engine"]), adapters).check(request)
            if has_long_prompt(Path(entry["engine"]), request):
                continue
        except InputError as error:
            warnings.warn(f"engine {entry['engine']}: {error}; it is left out", stacklevel=2)
            continue
        expected, of_torch = (expect(entry[key], request) for key in ("times", "torch_times"))
        if expected < of_torch:
            fitting.append((entry["engine"], expected, of_torch))
    return min(fitting, key=lambda found: found[1], default=None)


def has_long_prompt(engine: Path, request: Request) -> bool:
    """Return whether a prompt has more tokens than an engine takes, by the tokenizer that lies with it.

    Raises InputError where that cannot be read.
    """
    texts = (*request.composition.texts, *request.negatives, *request.words)
    if all(len(text.encode()) <= 75 and "BREAK" not in text for text in texts):  # a token is a byte at least
        return False
    from transformers import CLIPTokenizer

    from runtime.text.encode import is_long

    try:
        tokenizer = CLIPTokenizer.from_pretrained(engine / MODEL_FILES / "tokenizer", local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"its tokenizer cannot be read: {first_line(error)}") from error
    return is_long(tokenizer, texts, request.prompt_syntax)


def expect(times: Mapping[str, float], request: Request) -> float:
    """Return the milliseconds until a request's pictures are there: as measured, its work in proportion to steps,
    pixels and rows of the UNet."""
    height, width = request.size(times["pixels"] ** 0.5)
    rows = request.rows(request.guidance > 1)
    steps = request.run_steps * (1 + request.draws_reference)
    work = height * width / times["pixels"] * rows / 2 * steps / STEPS
    return times["first_ms"] + (work - 1) * times["picture_ms"]


def identity(model: str, adapters: Mapping[str, str], dtype: str) -> dict[str, object]:
    """Return what a measurement is good for: the machine, and the model's files as they are now."""
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "dtype": dtype,
        "model": fingerprint(EMBEDDED if model == "embedded" else model),
        "adapters": {name: fingerprint(path) for name, path in adapters.items()},
    }


def manifest_digest(engine: str) -> str:
    """Return the hash of an engine folder's manifest. Raises InputError where there is none."""
    try:
        return sha256(Path(engine) / NAME)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"its manifest.json cannot be read: {reason_of(error)}") from error


def fingerprint(source: str | Path) -> str:
    """Return a file's or folder's place and a hash of every name, size and time of change in it; a hub id as it is."""
    path = expand(source)
    if not path.exists():
        return str(source)
    files = [path] if path.is_file() else sorted(files_below(path))
    kept = [file for file in files if "__pycache__" not in file.parts]
    facts = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in kept]
    return f"{path.absolute()} {hashlib.sha256(repr(facts).encode()).hexdigest()}"


def read_table() -> list[dict]:
    """Return what was measured, nothing where nothing was. Raises InputError where the table is broken."""
    path = cache_folder(create=False) / TABLE
    try:
        if not path.is_file():
            return []
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a table of measurements: {first_line(error)}; {REMEDY}") from error
    if not isinstance(table, list) or not all(map(is_entry, table)):
        raise InputError(f"{path}: not a table of measurements; {REMEDY}")
    return table


def is_entry(entry: object) -> bool:
    """Return whether a value of the table is one that `run` wrote."""
    kinds = {**dict.fromkeys(("device", "dtype", "model", "engine", "manifest"), str), "adapters": dict}
    kinds |= {"times": dict, "torch_times": dict}
    if not isinstance(entry, dict) or any(not isinstance(entry.get(k), kind) for k, kind in kinds.items()):
        return False
    numbers = [entry[key].get(name) for key in ("times", "torch_times") for name in TIMES]
    return all(is_finite_number(n) and n > 0 for n in numbers)


def absolute(folder: str | Path) -> str:
    return str(expand(folder).absolute())


if __name__ == "__main__":
    sys.exit(main())
