"""python -m runtime.generate --prompt TEXT [--condition IMAGE --mask IMAGE ...] --out out.png

Text-to-image with controls that act only inside painted regions. --help lists the options.
"""

from __future__ import annotations

# isort: off
import runtime.cli.interrupt  # noqa: F401 -- before the seconds that the other imports take
# isort: on

import argparse
import contextlib
import sys
import time
import warnings
from typing import TYPE_CHECKING

from tqdm import tqdm

from runtime.cli.command import exit_code, quick_imports, say
from runtime.cli.load import load
from runtime.cli.options import parse
from runtime.cli.plan import (
    FIXED_BY_ENGINE,
    capabilities,
    check_outputs,
    make_request,
    picture_paths,
    region_paths,
)
from runtime.cli.regions import region_fields
from runtime.cli.sources import adapter_sources
from runtime.errors import InputError, first_line

if TYPE_CHECKING:
    from runtime import LocalControlPipeline, Result
    from runtime.sampling.progress import Progress
    from runtime.sampling.request import Request


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for bad input (one line on stderr), or 130 where it was interrupted."""
    options = parse(arguments)
    return exit_code(lambda: generate(options))


def generate(options: argparse.Namespace) -> None:
    """Check, load, compute, write."""
    start = time.perf_counter()
    with quick_imports():
        fields = region_fields(options)
        request = make_request(options, fields, check_outputs(options))
        capabilities(options).check(request)
        import runtime.pipeline  # noqa: F401 -- so that its seconds count as the start's
        from runtime.cli.describe import describe
        from runtime.control.region import Region

    seconds = {"start": time.perf_counter() - start}
    _say_stage("start", seconds["start"], "imports and checks")
    begun = time.perf_counter()
    pipe, result = draw_fastest(options, request) or draw(options, request)
    # What the picture waited for: the choice of an engine and one that has failed, too.
    seconds["model"] = time.perf_counter() - begun - result.timings["total"]
    for stage in ("encode", "text", "adapter", "reference", "denoise", "decode"):
        if stage in result.timings:
            _say_stage(
                stage, result.timings[stage], f"{request.run_steps} steps" if stage == "denoise" else ""
            )
    named = [
        {**given, **region_paths(Region.from_dict(given, name, folder))} for name, given, folder in fields
    ]
    settings = describe(pipe, result, request, named, options.image, options)
    save(pipe, result, request, settings, options, {**seconds, **result.timings})


def draw_fastest(options: argparse.Namespace, request: Request) -> tuple[LocalControlPipeline, Result] | None:
    """Draw on the engine that `runtime.fastest` found quickest; None where there is none, or it fails.

    Nobody has asked for that engine: whatever is wrong with it is a warning, and the picture comes from PyTorch.
    """
    found = fastest_engine(options, request)
    if found is None:
        return None
    engine, expected, of_torch = found
    times = f"{expected / 1e3:.1f} s expected, {of_torch / 1e3:.1f} s in PyTorch"
    say(f"backend  {engine}: {times} (--backend torch takes that)")
    chosen = argparse.Namespace(**{**vars(options), "engine": engine, "model": None, "dtype": None})
    try:
        drawn = draw(chosen, request)
    except Exception as error:  # an InputError, or whatever a library raises on a damaged file
        warnings.warn(f"engine {engine}: {first_line(error)}; PyTorch is used", stacklevel=2)
        return None
    options.engine = engine
    return drawn


def fastest_engine(options: argparse.Namespace, request: Request) -> tuple[str, float, float] | None:
    """Return the engine that `runtime.fastest` found quickest for this request, unless an option needs PyTorch.

    Its folder, the milliseconds expected of it, and of PyTorch. Nothing that is wrong with an engine or with what was
    measured is an error: it is a warning, and PyTorch draws the picture.
    """
    from runtime.fastest import choose
    from runtime.machine.arithmetic import name_of
    from runtime.machine.device import pick_device, pick_dtype

    asked = ("engine", *FIXED_BY_ENGINE[1:], "device", "lora", "tokenizer", "config")
    if (
        options.backend != "auto"
        or request.cache_interval > 1
        or any(getattr(options, name) for name in asked)
    ):
        return None
    dtype = name_of(pick_dtype(options.dtype, pick_device(None)))
    try:
        return choose(options.model or "embedded", adapter_sources(options.adapter), dtype, request)
    except InputError as error:
        warnings.warn(f"{error}; PyTorch is used", stacklevel=2)
        return None


def draw(options: argparse.Namespace, request: Request) -> tuple[LocalControlPipeline, Result]:
    """Load the pipeline and draw the request, with a progress bar."""
    pipe = load(options, request)
    with contextlib.ExitStack() as opened:
        bar = None

        def on_step(done: Progress) -> None:
            nonlocal bar
            if bar is None:  # with the first step: a warning before it has a line of its own
                bar = opened.enter_context(
                    tqdm(total=done.steps, desc="denoise", unit="step", dynamic_ncols=True)
                )
            bar.update(done.step - bar.n)

        return pipe, pipe.draw(request, on_step)


def save(
    pipe: LocalControlPipeline,
    result: Result,
    request: Request,
    settings: dict,
    options: argparse.Namespace,
    seconds: dict[str, float],
) -> None:
    """Write the pictures, the sheet and the report."""
    from runtime.cli.describe import png_text
    from runtime.control.png import save_png
    from runtime.control.region import union
    from runtime.control.sheet import changed_outside, make_sheet
    from runtime.machine.files import write_json
    from runtime.machine.report import device_name, peak_memory, versions

    start, paths = time.perf_counter(), picture_paths(options)
    for i, (path, image) in enumerate(zip(paths, result.images, strict=True)):
        own = settings | {"seed": result.seed + i}
        save_png(image, path, png_text(own, options.metadata))
        say(f"saved {path} (seed {own['seed']})")
    width, height = result.images[0].size
    packed = request.pack(height, width)
    references = [] if result.reference is None else result.reference.images
    changed = None
    if references:
        outside = union(packed, height, width)[0, 0].numpy()
        changed = sum(changed_outside(*pair, outside) for pair in zip(result.images, references, strict=True))
        held = f"{options.image} as RGB" if options.image else "the picture without control"
        say(f"outside  {changed} of {width} x {height} pixels differ from {held}")
    if options.sheet:
        sheet = make_sheet(result.images, packed, options.prompt, result.seed, references)
        save_png(sheet, options.sheet)
        say(f"saved {options.sheet}")
    if options.report:
        # without the pipeline's own total: this one is the whole run's
        stages = {stage: value for stage, value in seconds.items() if stage != "total"}
        stages["save"] = time.perf_counter() - start
        seconds = {**stages, "total": sum(stages.values())}
        report = {
            "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
            "peak_memory_bytes": peak_memory(pipe.device),
            "device": device_name(pipe.device),
            "versions": versions(),
            "images": [str(path) for path in paths],
            "region_steps": [list(steps) for steps in result.region_steps],
            "pixels_changed_outside": changed,
            "settings": settings,
        }
        write_json(report, options.report)
        say(f"saved {options.report}")


def _say_stage(stage: str, seconds: float, note: str = "") -> None:
    say(f"{stage:8} {seconds:6.2f} s  {note}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
