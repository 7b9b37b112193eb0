"""python -m runtime.generate --prompt TEXT [--condition IMAGE --mask IMAGE ...] --out out.png

Text-to-image with controls that act only inside painted regions. --help lists the options.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from runtime.errors import InputError
from runtime.options import adapter_sources, lora_sources, make_parser, region_fields

if TYPE_CHECKING:
    from runtime import LocalControlPipeline, Region, Result

CANCELLED = 130  # the shell's code for an interrupt


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input (one line on stderr), or 130 where it was interrupted."""
    options = make_parser().parse_args(arguments)
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # before its import: it tells of parts not used here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            generate(options)
    except InputError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted: nothing was written")
        return CANCELLED
    return 0


def generate(options: argparse.Namespace) -> None:
    """Check, load, compute, write."""
    fields = region_fields(options)
    outputs = check_outputs(options)
    from runtime import LocalControlPipeline  # torch and diffusers: seconds, so after the first checks

    check_inputs(options, fields)
    start = time.perf_counter()
    pipe = LocalControlPipeline.from_pretrained(
        options.model,
        adapter_sources(options.adapter) or None,
        device=options.device,
        dtype=options.dtype,
        backend=options.backend,
        allow_pickle=options.allow_pickle,
        vae=options.vae,
        loras=lora_sources(options.lora),
        tokenizer=options.tokenizer,
        config=options.config,
    )
    loading = time.perf_counter() - start
    _say_stage("model", loading)
    regions = make_regions(fields, options.height or pipe.default_size, options.width or pipe.default_size)
    result = run(pipe, regions, options)
    save(pipe, result, regions, fields, options, outputs, {"model": loading, **result.timings})


def check_outputs(options: argparse.Namespace) -> list[Path]:
    """The pictures' paths, once every file to be written is known to be writable."""
    from runtime.images import check_writable

    if options.images < 1:
        raise InputError(f"--images {options.images}: expected a whole number of at least 1")
    out = Path(options.out)
    paths = [out, *(out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, options.images))]
    named = [("--out", path, ".png") for path in paths]
    named += [("--sheet", options.sheet, ".png")] * bool(options.sheet)
    named += [("--report", options.report, ".json")] * bool(options.report)
    seen: dict[Path, str] = {}
    for name, path, suffix in named:
        if Path(path).suffix.lower() != suffix:
            raise InputError(f"{name} {path}: expected a name that ends in {suffix}")
        resolved = check_writable(path, name).resolve()
        if resolved in seen:
            raise InputError(f"{name} {path} is also {seen[resolved]}; expected another file")
        seen[resolved] = name
    return paths


def check_inputs(options: argparse.Namespace, fields) -> None:
    """What can be known to be wrong before the model is loaded."""
    from runtime import conditions
    from runtime.images import load_image
    from runtime.pipeline import check_call
    from runtime.region import Region, check_size
    from runtime.sampler import check_name

    check_call(
        [options.prompt],
        options.negative_prompt,
        options.steps,
        options.guidance,
        options.seed,
        options.images,
    )
    for name, value in (("height", options.height), ("width", options.width)):
        if value is not None:
            check_size(**{"height": 16, "width": 16, name: value})
    check_name(options.scheduler)
    for name, given, folder in fields:
        method = given.get("preprocess") if isinstance(given, dict) else None
        rest = {k: v for k, v in given.items() if k != "preprocess"} if isinstance(given, dict) else given
        region = Region.from_dict(rest, name, folder)
        load_image(region.condition, f"{name} condition")
        if region.mask is not None:
            load_image(region.mask, f"{name} mask", background="black")
        if method and method not in conditions.names():
            raise InputError(
                f"{name}: preprocess {method!r} is unknown; expected one of {', '.join(conditions.names())}"
            )


def make_regions(fields, height: int, width: int) -> list[Region]:
    """The regions, their conditions computed at the picture's size."""
    from runtime.region import Region

    return [Region.from_dict(given, name, folder, size=(height, width)) for name, given, folder in fields]


def run(pipe: LocalControlPipeline, regions: list[Region], options: argparse.Namespace) -> Result:
    """Generate with a progress bar, and say what each stage took."""
    with contextlib.ExitStack() as opened:
        bar = None

        def progress(done: int, steps: int) -> None:
            nonlocal bar
            if bar is None:  # with the first step: a warning before it has a line of its own
                bar = opened.enter_context(tqdm(total=steps, desc="denoise", unit="step", dynamic_ncols=True))
            bar.update(done - bar.n)

        result = pipe(
            options.prompt,
            regions,
            options.negative_prompt,
            options.height,
            options.width,
            options.steps,
            options.guidance,
            options.seed,
            options.images,
            options.scheduler,
            progress=progress,
        )
    for stage in ("text", "adapter", "denoise", "decode"):
        _say_stage(stage, result.timings[stage], f"{options.steps} steps" if stage == "denoise" else "")
    return result


def save(
    pipe, result: Result, regions, fields, options: argparse.Namespace, outputs, timings: dict[str, float]
) -> None:
    """Write the pictures, the sheet and the report."""
    from runtime.images import save_png
    from runtime.report import device_name, peak_memory, versions, write_json
    from runtime.sheet import make_sheet

    settings = describe(pipe, result, fields, options)
    start = time.perf_counter()
    for i, (path, image) in enumerate(zip(outputs, result.images, strict=True)):
        own = settings | {"seed": result.seed + i}
        text = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in own.items()}
        save_png(image, path, text)
        _say(f"saved {path} (seed {own['seed']})")
    if options.sheet:
        save_png(make_sheet(result.images, regions, options.prompt, result.seed), options.sheet)
        _say(f"saved {options.sheet}")
    if options.report:
        report = {
            "seconds": {name: round(value, 4) for name, value in timings.items()}
            | {"save": round(time.perf_counter() - start, 4)},
            "peak_memory_bytes": peak_memory(pipe.device),
            "device": device_name(pipe.device),
            "versions": versions(),
            "images": [str(path) for path in outputs],
            "settings": settings,
        }
        write_json(report, options.report)
        _say(f"saved {options.report}")


def describe(pipe: LocalControlPipeline, result: Result, fields, options: argparse.Namespace) -> dict:
    """All that it takes to repeat the run."""
    width, height = result.images[0].size
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "regions": [given for _, given, _ in fields],
        "seed": result.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "scheduler": options.scheduler or type(pipe.model.scheduler).__name__,
        "height": height,
        "width": width,
        "model": options.model,
        "adapters": options.adapter,
        "vae": options.vae,
        "loras": options.lora,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "backend": pipe.backend,
        "software": f"localcontrol {_version()}",
    }


def _version() -> str:
    import kernels

    return kernels.__version__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_stage(stage: str, seconds: float, note: str = "") -> None:
    _say(f"{stage:8} {seconds:6.2f} s  {note}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
