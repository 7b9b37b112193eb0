"""What `runtime.generate` is asked for, checked before the seconds that models take: its request, files and engine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli.sources import adapter_sources
from runtime.errors import InputError
from runtime.machine.files import expand

if TYPE_CHECKING:
    from runtime.capabilities import Capabilities
    from runtime.engines.manifest import Manifest
    from runtime.sampling.request import Request

Fields = list[tuple[str, dict[str, Any], Path | None]]  # see `regions.region_fields`
# Options that do not go with engines: what they ask for is fixed when those are built.
FIXED_BY_ENGINE = (
    *(
        "dtype",
        "vae",
        "prediction_type",
        "attention",
        "compile",
        "cuda_graph",
        "quantize",
        "offload",
        "vae_tiling",
    ),
)


def picture_paths(options: argparse.Namespace) -> list[Path]:
    """Return where the pictures go: out.png, out-1.png ..."""
    out = Path(options.out)
    return [out, *(out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, options.images))]


def check_outputs(options: argparse.Namespace) -> dict[Path, str]:
    """Return every file to be written, found to be writable: its resolved path, and the option that names it."""
    from runtime.arguments import whole_number
    from runtime.sampling.request import MAX_IMAGES

    whole_number(options.images, "--images", most=MAX_IMAGES)
    named = [("--out", path, ".png") for path in picture_paths(options)]
    named += [("--sheet", options.sheet, ".png")] * bool(options.sheet)
    named += [("--report", options.report, ".json")] * bool(options.report)
    outputs: dict[Path, str] = {}
    for name, path, suffix in named:
        resolved = check_output(path, name, suffix)
        if resolved in outputs:
            raise InputError(f"{name} {path} is also {outputs[resolved]}; expected another file")
        outputs[resolved] = name
    return outputs


def check_output(path: str | Path, name: str, suffix: str) -> Path:
    """Return the resolved path of a file to be written. Raises InputError where it cannot be, or ends otherwise."""
    from runtime.machine.files import check_writable

    if Path(path).suffix.lower() != suffix:
        raise InputError(f"{name} {path}: expected a name that ends in {suffix}")
    return check_writable(path, name).resolve()


def make_request(options: argparse.Namespace, fields: Fields, outputs: dict[Path, str]) -> Request:
    """Return the options' request, its pictures read. Raises InputError where an output would overwrite a picture."""
    from runtime.control.region import Region
    from runtime.sampling.request import MAX_SEED, Request

    if options.seed is not None and options.seed <= MAX_SEED < options.seed + options.images - 1:
        last = MAX_SEED - options.images + 1
        raise InputError(f"--seed {options.seed}: of {options.images} images; expected at most {last}")
    regions = [Region.from_dict(given, name, folder) for name, given, folder in fields]
    named = [
        (f"{region.label} {key}", path) for region in regions for key, path in region_paths(region).items()
    ]
    named += [("--image", options.image), ("--regions", options.regions)]
    for name, path in named:
        # realpath: a link to itself is for the reader to refuse
        if path and (written := outputs.get(Path(os.path.realpath(expand(path, name))))) is not None:
            raise InputError(f"{name}: {path} would be overwritten by {written}; expected another file")
    return Request(
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
        guidance_range=options.guidance_range,
        guidance_rescale=options.guidance_rescale,
        cache_interval=options.cache_interval,
        prompt_syntax=options.prompt_syntax,
        clip_skip=options.clip_skip,
        image=options.image,
        strength=options.strength,
        outside=options.outside,
    )


def region_paths(region) -> dict[str, str]:
    """Return the files that a region names, as they are seen from the working folder."""
    found = {"condition": region.condition, "mask": region.mask}
    return {key: str(path) for key, path in found.items() if path is not None}


def capabilities(options: argparse.Namespace) -> Capabilities:
    """Return what the options' model can draw. Raises InputError for options that do not go together."""
    from runtime.capabilities import Capabilities
    from runtime.loading.adapter import embedded_adapters
    from runtime.machine.device import check_compile, pick_device
    from runtime.optimize.offload import whole_steps

    if options.engine:
        return of_engine(options)
    check_compile(options.compile, options.cuda_graph, pick_device(options.device), options.offload)
    embedded = options.model in (None, "embedded")
    own = embedded_adapters() if embedded else ()
    compiled = "a compiled UNet" if options.compile or options.cuda_graph else None
    named = adapter_sources(options.adapter)
    return Capabilities(
        {*own, *named},
        whole_steps=compiled or whole_steps(options.offload),
    )


def of_engine(options: argparse.Namespace) -> Capabilities:
    """Return what the options' engines can draw, with the adapters that are loaded beside them."""
    from runtime.capabilities import of_manifest
    from runtime.engines.manifest import read_manifest

    for name in FIXED_BY_ENGINE:
        if getattr(options, name):
            raise InputError(
                f"--{name.replace('_', '-')} with --engine: it is fixed when the engines are built; leave it out"
            )
    manifest = read_manifest(options.engine)
    for name in ("tokenizer", "config"):
        if getattr(options, name) and not loads_model(options, manifest):
            raise InputError(
                f"--{name} with --engine: the engines have their own; leave it out, or give the --model that it is of"
            )
    return of_manifest(manifest, adapter_sources(options.adapter))


def loads_model(options: argparse.Namespace, manifest: Manifest) -> bool:
    """Return whether the model, too, is loaded beside its engines."""
    from runtime.engines.parts import PARTS  # it imports diffusers

    return bool(options.model or options.lora) or not all(part in manifest.engines for part in PARTS)
