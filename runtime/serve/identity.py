"""Which model this is, and what it can: known where requests are taken, wherever it is loaded."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.capabilities import Capabilities
from runtime.cli.sources import adapter_sources, lora_sources
from runtime.control.conditions import depth_model_digest
from runtime.engines.manifest import NAME
from runtime.loading.load import EMBEDDED
from runtime.machine.files import expand, files_below, sha256
from runtime.pipeline import LocalControlPipeline

READ = (".safetensors", ".json", ".txt", ".bin", ".ckpt", ".pt", ".pth")  # what a model is loaded from


@dataclass(frozen=True)
class Served:
    """A model that is served.

    name: without the place where it lies. hash: of its files. rows: of the UNet in a step.
    """

    name: str
    hash: str
    device: str
    rows: int
    controlnets: Sequence[str]
    capabilities: Capabilities

    @classmethod
    def of(cls, pipe: LocalControlPipeline, hash: str, rows: int) -> Served:
        name, device = Path(pipe.model.name).name, str(pipe.device)
        return cls(name, hash, device, rows, list(pipe.controlnets), pipe.capabilities)


def model_hash(options: argparse.Namespace) -> str:
    """Return the hash, 32 hex digits, of the model, its adapters and LoRAs, or of the engines, that options name.

    Equal requests to servers of equal hashes have equal pictures: the model that depth is computed by is in it too.

    Of a hub id that is not on this disk by that name it is the name's.
    """
    sha = hashlib.sha256()
    named = {
        "model": options.model or ("embedded" if not options.engine else None),
        "engine": options.engine and str(Path(options.engine) / NAME),
        "vae": options.vae,
        "tokenizer": options.tokenizer,
        "config": options.config,
        **{f"adapter {name}": path for name, path in adapter_sources(options.adapter).items()},
        **{f"lora {i} {weight:g}": path for i, (path, weight) in enumerate(lora_sources(options.lora))},
    }
    settings = {name: getattr(options, name) for name in ("dtype", "prediction_type", "quantize")}
    settings |= {"vae_tiling": True} if options.vae_tiling else {}  # the hash without it stays as it was
    for name, source in named.items():
        if source is not None:
            sha.update(f"{name} {_contents(source)}\n".encode())
    depth = depth_model_digest()
    settings |= {"depth": depth} if depth else {}
    sha.update(repr(sorted(settings.items())).encode())
    return sha.hexdigest()[:32]


def _contents(source: str) -> str:
    """Return a hash of what a source holds, wherever it lies."""
    path = EMBEDDED if source == "embedded" else expand(source)
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return source
    files = sorted(file for file in files_below(path) if file.suffix in READ)
    listed = "".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()
