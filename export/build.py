"""A build: load the model, write every graph as ONNX, compile each, and only then give the folder its name.

Everything is made in `.<name>.part` beside the folder. `stages.json` in it lists the stages that are whole, with their
files' hashes: what a killed build leaves never looks finished, and a resumed one goes on after the last of them.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from export.graphs import Component, make_components
from export.onnx_export import export_onnx
from export.out_folder import check_folder, check_room
from export.progress import stage
from export.sizes import make_profile
from export.stages import Stages
from export.targets.compile import compile_engine
from export.targets.options import CompileOptions
from runtime.control.adapters import check_adapter
from runtime.control.levels import SIZE_MULTIPLE
from runtime.engines.base import package_version
from runtime.engines.manifest import (
    MODEL_FILES,
    EngineSpec,
    Manifest,
    encode,
    parse_profile,
    parse_spec,
    write_manifest,
)
from runtime.engines.parts import model_weights
from runtime.engines.targets import TARGETS
from runtime.engines.unet_once import save_once_per_image
from runtime.errors import InputError
from runtime.loading.adapter import embedded_adapters, load_adapter
from runtime.loading.load import Model, load_model
from runtime.loading.weights import weights_digest
from runtime.machine.arithmetic import DTYPES
from runtime.machine.files import size_of
from runtime.machine.report import versions
from runtime.model.vae import vae_factor
from runtime.sampling.progress import projection_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class BuildSettings:
    """What to build; see `python -m export.build_engine --help`. sizes: of batch, height and width, as given there.

    words: how many regions can have words of their own.
    """

    model: str
    adapters: Mapping[str, str]
    vae: str | None
    loras: list[tuple[str, float]]
    tokenizer: str | None
    config: str | None
    prediction_type: str | None
    allow_pickle: bool
    components: tuple[str, ...]
    sizes: Mapping[str, str | None]
    guidance: str
    precision: str
    compiler: CompileOptions
    keep_onnx: bool = True
    words: int = 0


def build_folder(
    settings: BuildSettings,
    folder: Path,
    command: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force: bool = False,
    say: Say = print,
) -> Manifest:
    """Build the engines of a folder; it appears under its name when all is done.

    command: written into the manifest, to be told where the folder does not match. Raises InputError, with nothing left
    under that name, for bad input and where memory or disk are too small (unless `force`).
    """
    check_folder(folder, overwrite)
    make_profile(
        settings.sizes, settings.guidance, SIZE_MULTIPLE
    )  # wrong ones are named before anything is loaded
    try:
        return _build(settings, folder, command, resume, force, say)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror or error}") from error


def _build(
    settings: BuildSettings, folder: Path, command: str, resume: bool, force: bool, say: Say
) -> Manifest:
    found = {**versions(), **package_version(settings.compiler.target), "gpu": _gpu(settings)}
    facts = {**asdict(settings), "versions": found}
    with Stages(folder, facts, resume) as stages:
        plan = make_graphs(settings, stages, force, say)
        specs = compile_graphs(settings, stages, plan, say)
        manifest = _manifest(settings, stages, plan, specs, command)
        write_manifest(manifest, stages.work)
        stages.publish(folder, keep=[*manifest.files])
    size = sum(entry["bytes"] for entry in manifest.files.values())
    say(f"saved {folder} ({size_of(size)}, {len(manifest.engines)} engines)")
    return manifest


@dataclass(frozen=True)
class Plan:
    """What the model turned out to be: the sizes, the engines to make, and the manifest's facts on the model."""

    profile: dict
    model: dict
    adapters: dict
    specs: dict[str, dict]
    bytes: dict[str, int]


def make_graphs(settings: BuildSettings, stages: Stages, force: bool, say: Say) -> Plan:
    """Return every component as ONNX. The model is in memory only in here, and not at all where all
    are there already.
    """
    known = stages.done("model")
    if known is not None and all(stages.done(f"onnx {name}") is not None for name in known["specs"]):
        return Plan(**known)
    with stage("load", say) as (_, cost):
        model, adapters = load(settings)
    components = list(make_components(model, adapters, settings.components, settings.words))
    plan = _plan(settings, model, components)
    if known is not None and Plan(**known) != plan:
        raise InputError(
            f"--resume: {settings.model} or an adapter has changed since; expected the same weights"
        )
    check_room(settings.compiler.target, plan.bytes, stages, force, say)
    shutil.rmtree(stages.work / MODEL_FILES, ignore_errors=True)  # of a build that was stopped
    configs = _save_configs(model, settings.components, stages.work / MODEL_FILES)
    stages.finish("model", asdict(plan), configs, cost)
    for component in components:
        if stages.done(f"onnx {component.name}") is None:
            path = stages.work / "onnx" / f"{component.name}.onnx"
            path.parent.mkdir(exist_ok=True)
            with stage(f"export {component.name}", say) as (progress, cost):
                export_onnx(component, parse_profile(plan.profile), path, progress)
            data = path.with_name(f"{path.name}.data")
            stages.finish(f"onnx {component.name}", {}, [path, *([data] if data.exists() else [])], cost)
    del model, adapters, components, component
    gc.collect()
    return plan


def load(settings: BuildSettings) -> tuple[Model, dict]:
    """Return the model and its adapters, in the precision that is compiled."""
    dtype, sources = DTYPES[settings.precision], dict(settings.adapters)
    if settings.model == "embedded":
        sources = {**embedded_adapters(), **sources}
    wanted = sources if "adapter" in settings.components else {}
    if settings.components == ("adapter",) and not wanted:
        raise InputError("--components adapter: there is no --adapter; expected one, or other components")
    options = {"dtype": dtype, "allow_pickle": settings.allow_pickle}
    adapters = {
        name: load_adapter(source, device="cpu", name=name, **options).requires_grad_(False)
        for name, source in wanted.items()
    }
    model = load_model(
        settings.model,
        vae=settings.vae,
        loras=settings.loras,
        tokenizer=settings.tokenizer,
        config=settings.config,
        prediction_type=settings.prediction_type,
        **options,
    )
    for name in adapters:
        check_adapter(name, adapters, model.unet.config.control_channels)
    return model, adapters


def _plan(settings: BuildSettings, model: Model, components: list[Component]) -> Plan:
    specs = {
        component.name: EngineSpec(
            files=(),
            inputs=component.inputs,
            outputs=component.outputs,
            dtype=next(component.module.parameters()).dtype,
            weights=weights_digest(component.module),
            onnx=f"onnx/{component.name}.onnx",
            layers={},
        )
        for component in components
    }
    facts = {
        "source": str(settings.model),
        "vae": settings.vae,
        "loras": [list(lora) for lora in settings.loras],
        "tokenizer": settings.tokenizer,
        "config": settings.config,
        "sample_size": model.sample_size,
        "force_zeros_for_empty_prompt": model.force_zeros_for_empty_prompt,
        "weights": model_weights(model),
    }
    default = model.sample_size * vae_factor(model.vae)
    return Plan(
        profile=encode(asdict(make_profile(settings.sizes, settings.guidance, default))),
        model=facts,
        adapters={name: str(source) for name, source in settings.adapters.items()},
        specs={name: encode(asdict(spec)) for name, spec in specs.items()},
        bytes={c.name: sum(p.nbytes for p in c.module.parameters()) for c in components},
    )


def _save_configs(model: Model, components: tuple[str, ...], folder: Path) -> list[Path]:
    """Return what a pipeline needs besides the engines: tokenizers, scheduler, the VAE's config, the UNet's part in
    torch.
    """
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), model.tokenizers, strict=True):
        tokenizer.save_pretrained(folder / name)
    model.scheduler.save_pretrained(folder / "scheduler")
    model.vae.save_config(folder / "vae")
    projection_of(model).write(folder / "vae")
    if "unet" in components:
        save_once_per_image(model.unet, folder / "unet")
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def compile_graphs(settings: BuildSettings, stages: Stages, plan: Plan, say: Say) -> dict[str, EngineSpec]:
    """Return every ONNX file as an engine."""
    profile, specs = parse_profile(plan.profile), {}
    for name, data in plan.specs.items():
        spec, made = parse_spec(data), stages.done(f"engine {name}")
        if made is None:
            folder = stages.work / "engines"
            folder.mkdir(exist_ok=True)
            with stage(f"compile {name}", say) as (progress, cost):
                compiled = compile_engine(
                    stages.work / spec.onnx,
                    folder,
                    spec.inputs,
                    spec.dtype,
                    profile,
                    settings.compiler,
                    progress,
                )
            files = [path for path in compiled.files if path.exists()]
            made = {
                "files": [str(path.relative_to(stages.work)) for path in files],
                "layers": compiled.layers,
            }
            stages.finish(f"engine {name}", made, files, cost)
        specs[name] = replace(spec, files=tuple(made["files"]), layers=made["layers"])
    return specs


def _gpu(settings: BuildSettings) -> str | None:
    """Return the GPU whose kind the engines run on, where they run on no other."""
    return torch.cuda.get_device_name() if settings.compiler.target == "tensorrt" else None


def _manifest(
    settings: BuildSettings, stages: Stages, plan: Plan, specs: dict[str, EngineSpec], command: str
) -> Manifest:
    compiler = settings.compiler
    files = stages.files()
    if not settings.keep_onnx:
        used = {file for spec in specs.values() for file in spec.files}
        files = {name: entry for name, entry in files.items() if not name.startswith("onnx/") or name in used}
        specs = {
            name: replace(spec, onnx=spec.onnx if spec.onnx in files else None)
            for name, spec in specs.items()
        }
    return Manifest(
        target=compiler.target,
        precision=settings.precision,
        profile=parse_profile(plan.profile),
        engines=specs,
        model=plan.model,
        adapters=plan.adapters,
        compute_capabilities=compiler.capabilities,
        gpu=_gpu(settings),
        refit=compiler.refit or TARGETS[compiler.target].portable,
        versions={**versions(), **package_version(compiler.target), "torch": torch.__version__},
        files=files,
        stages=stages.costs(),
        command=command,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )
