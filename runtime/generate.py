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
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

import kernels
from runtime.command_line import exit_code, say
from runtime.errors import InputError
from runtime.options import adapter_sources, lora_sources, make_parser, region_fields

if TYPE_CHECKING:
    from runtime import LocalControlPipeline, Region, Result


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input (one line on stderr), or 130 where it was interrupted."""
    options = make_parser().parse_args(arguments)
    # Before its import: it tells of parts that are not used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = lambda message, *_, **__: say(" ".join(f"warning: {message}".split()))
        return exit_code(lambda: generate(options))


def generate(options: argparse.Namespace) -> None:
    """Check, load, compute, write."""
    start = time.perf_counter()
    fields = region_fields(options)
    check_files(fields, check_outputs(options))
    check_settings(options, fields)
    import runtime.pipeline  # noqa: F401 -- so that its seconds count as the start's

    seconds = {"start": time.perf_counter() - start}
    _say_stage("start", seconds["start"], "imports and checks")
    start = time.perf_counter()
    pipe = load(options)
    seconds["model"] = time.perf_counter() - start
    _say_stage("model", seconds["model"])
    regions = make_regions(fields, options.height or pipe.default_size, options.width or pipe.default_size)
    result = run(pipe, regions, options)
    settings = describe(pipe, result, fields, options)
    save(pipe, result, regions, settings, options, {**seconds, **result.timings})


def load(options: argparse.Namespace) -> LocalControlPipeline:
    """The pipeline that the options ask for, in torch or on engines."""
    from runtime import LocalControlPipeline

    common = {
        "device": options.device,
        "backend": options.backend,
        "allow_pickle": options.allow_pickle,
        "loras": lora_sources(options.lora),
        "tokenizer": options.tokenizer,
        "config": options.config,
    }
    adapters = adapter_sources(options.adapter)
    if options.engine:
        return LocalControlPipeline.from_engine(options.engine, adapters, model=options.model, **common)
    return LocalControlPipeline.from_pretrained(
        options.model or "embedded", adapters, dtype=options.dtype, vae=options.vae, **common
    )


def picture_paths(options: argparse.Namespace) -> list[Path]:
    """Where the pictures go: out.png, out-1.png ..."""
    out = Path(options.out)
    return [out, *(out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, options.images))]


def check_outputs(options: argparse.Namespace) -> dict[Path, str]:
    """Every file to be written, found to be writable: its resolved path, and the option that names it."""
    from runtime.images import check_writable

    if options.images < 1:
        raise InputError(f"--images {options.images}: expected a whole number of at least 1")
    named = [("--out", path, ".png") for path in picture_paths(options)]
    named += [("--sheet", options.sheet, ".png")] * bool(options.sheet)
    named += [("--report", options.report, ".json")] * bool(options.report)
    outputs: dict[Path, str] = {}
    for name, path, suffix in named:
        if Path(path).suffix.lower() != suffix:
            raise InputError(f"{name} {path}: expected a name that ends in {suffix}")
        resolved = check_writable(path, name).resolve()
        if resolved in outputs:
            raise InputError(f"{name} {path} is also {outputs[resolved]}; expected another file")
        outputs[resolved] = name
    return outputs


def check_files(fields, outputs: dict[Path, str]) -> None:
    """The regions' values and pictures, before the seconds that diffusers' import takes."""
    from runtime.images import load_image
    from runtime.region import Region

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again at the picture's own size
        for name, given, folder in fields:
            region = Region.from_dict(given, name, folder, size=(64, 64))  # any size: it is not known yet
            load_image(region.condition, f"{name} condition")
            if region.mask is not None:
                load_image(region.mask, f"{name} mask", background="black")
            for key, path in _paths(name, given, folder).items():
                if (written := outputs.get(Path(path).resolve())) is not None:
                    raise InputError(
                        f"{name} {key}: {path} would be overwritten by {written}; expected another file"
                    )


def check_settings(options: argparse.Namespace, fields) -> None:
    """What else can be known to be wrong before the model is loaded."""
    from runtime.adapter import check_name
    from runtime.checks import check_call
    from runtime.region import Region, check_size
    from runtime.sampler import check_name as check_scheduler

    for name, value in (("height", options.height), ("width", options.width)):
        if value is not None:
            check_size(**{"height": 16, "width": 16, name: value})
    check_call(
        [options.prompt],
        options.negative_prompt,
        options.steps,
        options.guidance,
        options.seed,
        options.images,
        options.guidance_range,
    )
    check_scheduler(options.scheduler)
    own = known_adapters(options)
    for _, given, _ in fields:
        check_name(given.get("adapter") or Region.adapter, {*own, *adapter_sources(options.adapter)})


def known_adapters(options: argparse.Namespace) -> Collection[str]:
    """The adapters that come with the model or the engines; InputError where an option does not go with engines."""
    from runtime.adapter import embedded_adapters

    if not options.engine:
        return embedded_adapters() if options.model in (None, "embedded") else ()
    from runtime.engine_model import adapter_names
    from runtime.manifest import read_manifest

    for name in ("dtype", "vae"):
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name} with --engine: it is fixed when the engines are built; expected without it"
            )
    manifest = read_manifest(options.engine)
    sizes = {
        name: getattr(options, name) for name in ("height", "width") if getattr(options, name) is not None
    }
    manifest.profile.check({**sizes, "rows": options.images * (1 + (options.guidance > 1))})
    return adapter_names(manifest)


def _paths(name: str, given: dict, folder: Path | None) -> dict[str, str]:
    """The files that a region names, as they are seen from the working folder."""
    from runtime.region import Region

    region = Region.from_dict({k: v for k, v in given.items() if k != "preprocess"}, name, folder)
    found = {"condition": region.condition, "mask": region.mask}
    return {key: str(path) for key, path in found.items() if path is not None}


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
            guidance_range=tuple(options.guidance_range),
            progress=progress,
        )
    for stage in ("text", "adapter", "denoise", "decode"):
        _say_stage(stage, result.timings[stage], f"{options.steps} steps" if stage == "denoise" else "")
    return result


def save(
    pipe, result: Result, regions, settings: dict, options: argparse.Namespace, seconds: dict[str, float]
) -> None:
    """Write the pictures, the sheet and the report."""
    from runtime.images import save_png
    from runtime.report import device_name, peak_memory, versions, write_json
    from runtime.sheet import make_sheet

    start, paths = time.perf_counter(), picture_paths(options)
    for i, (path, image) in enumerate(zip(paths, result.images, strict=True)):
        own = settings | {"seed": result.seed + i}
        text = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in own.items()}
        save_png(image, path, text)
        say(f"saved {path} (seed {own['seed']})")
    if options.sheet:
        save_png(make_sheet(result.images, regions, options.prompt, result.seed), options.sheet)
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
            "settings": settings,
        }
        write_json(report, options.report)
        say(f"saved {options.report}")


def describe(pipe: LocalControlPipeline, result: Result, fields, options: argparse.Namespace) -> dict:
    """All that it takes to repeat the run: the command line's options, with its defaults filled in."""
    from runtime.loading import DTYPES

    width, height = result.images[0].size
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "regions": [{**given, **_paths(name, given, folder)} for name, given, folder in fields],
        "seed": result.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "guidance_range": list(options.guidance_range),
        "scheduler": options.scheduler or type(pipe.model.scheduler).__name__,
        "height": height,
        "width": width,
        "model": pipe.model.name,
        "engine": options.engine,
        "adapters": options.adapter,
        "vae": options.vae,
        "loras": options.lora,
        "tokenizer": options.tokenizer,
        "config": options.config,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == pipe.dtype),
        "device": str(pipe.device),
        "backend": pipe.backend,
        "software": f"localcontrol {kernels.__version__}",
    }


def _say_stage(stage: str, seconds: float, note: str = "") -> None:
    say(f"{stage:8} {seconds:6.2f} s  {note}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
