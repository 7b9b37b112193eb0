"""What `runtime.generate` can know to be wrong before the seconds that imports and models take."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Collection
from pathlib import Path

from runtime.cli.options import adapter_sources
from runtime.errors import InputError

# Options that do not go with engines: what they ask for is fixed when those are built.
FIXED = ("vae", "attention", "compile", "cuda_graph", "quantize", "offload", "vae_tiling")


def picture_paths(options: argparse.Namespace) -> list[Path]:
    """Where the pictures go: out.png, out-1.png ..."""
    out = Path(options.out)
    return [out, *(out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, options.images))]


def check_outputs(options: argparse.Namespace) -> dict[Path, str]:
    """Every file to be written, found to be writable: its resolved path, and the option that names it."""
    from runtime.control.images import check_writable

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
    from runtime.control.images import load_image
    from runtime.control.region import Region

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again at the picture's own size
        for name, given, folder in fields:
            region = Region.from_dict(given, name, folder, size=(64, 64))  # any size: it is not known yet
            load_image(region.condition, f"{name} condition")
            if region.mask is not None:
                load_image(region.mask, f"{name} mask", background="black")
            for key, path in region_paths(name, given, folder).items():
                if (written := outputs.get(Path(path).resolve())) is not None:
                    raise InputError(
                        f"{name} {key}: {path} would be overwritten by {written}; expected another file"
                    )


def check_settings(options: argparse.Namespace, fields) -> None:
    """What else can be known to be wrong before the model is loaded."""
    from runtime.control.region import Region, check_size
    from runtime.loading.adapter import check_name
    from runtime.sampling.checks import check_call
    from runtime.sampling.loop import check_name as check_scheduler

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
        options.cache_interval,
    )
    check_scheduler(options.scheduler)
    for name, given in (
        ("compile", options.compile),
        ("cuda-graph", options.cuda_graph),
        ("engine", options.engine),
        ("offload group", options.offload == "group"),
    ):
        if options.cache_interval > 1 and given:
            raise InputError(
                f"--cache-interval {options.cache_interval} with --{name}: its UNet computes every step whole; "
                "expected 1"
            )
    own = known_adapters(options)
    for _, given, _ in fields:
        check_name(given.get("adapter") or Region.adapter, {*own, *adapter_sources(options.adapter)})


def known_adapters(options: argparse.Namespace) -> Collection[str]:
    """The adapters that come with the model or the engines; InputError where an option does not go with engines."""
    from runtime.loading.adapter import embedded_adapters

    if not options.engine:
        return embedded_adapters() if options.model in (None, "embedded") else ()
    from runtime.engines.manifest import read_manifest
    from runtime.engines.parts import adapter_names
    from runtime.sampling.loop import guided_steps

    for name in ("dtype", *FIXED):
        if getattr(options, name):
            raise InputError(
                f"--{name.replace('_', '-')} with --engine: it is fixed when the engines are built; "
                "expected without it"
            )
    manifest = read_manifest(options.engine)
    sizes = {
        name: getattr(options, name) for name in ("height", "width") if getattr(options, name) is not None
    }
    for guided in set(guided_steps(options.guidance, options.guidance_range, options.steps)):
        manifest.profile.check({**sizes, "rows": options.images * (1 + guided)})
    return adapter_names(manifest)


def region_paths(name: str, given: dict, folder: Path | None) -> dict[str, str]:
    """The files that a region names, as they are seen from the working folder."""
    from runtime.control.region import Region

    region = Region.from_dict({k: v for k, v in given.items() if k != "preprocess"}, name, folder)
    found = {"condition": region.condition, "mask": region.mask}
    return {key: str(path) for key, path in found.items() if path is not None}
