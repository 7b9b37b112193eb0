"""Which model this is: a hash of the files that were loaded, so that equal requests to equal servers are known."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from runtime.cli.options import adapter_sources, lora_sources
from runtime.engines.manifest import NAME
from runtime.loading.load import EMBEDDED
from runtime.machine.files import expand, sha256

READ = (".safetensors", ".json", ".txt", ".bin", ".ckpt", ".pt", ".pth")  # what a model is loaded from


def model_hash(options: argparse.Namespace) -> str:
    """Return the hash, 32 hex digits, of the model, its adapters and LoRAs, or of the engines, that options name.

    Of a hub id that is not on this disk by that name it is the name's.
    """
    sha = hashlib.sha256()
    named = {
        "model": options.model or ("embedded" if not options.engine else None),
        "engine": options.engine and str(Path(options.engine) / NAME),
        "vae": options.vae,
        **{f"adapter {name}": path for name, path in adapter_sources(options.adapter).items()},
        **{f"lora {i} {weight:g}": path for i, (path, weight) in enumerate(lora_sources(options.lora))},
    }
    settings = {name: getattr(options, name) for name in ("dtype", "prediction_type", "quantize")}
    for name, source in named.items():
        if source is not None:
            sha.update(f"{name} {_contents(source)}\n".encode())
    sha.update(repr(sorted(settings.items())).encode())
    return sha.hexdigest()[:32]


def _contents(source: str) -> str:
    """Return a hash of what a source holds, wherever it lies."""
    path = EMBEDDED if source == "embedded" else expand(source)
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return source
    files = sorted(file for file in path.rglob("*") if file.suffix in READ and file.is_file())
    listed = "".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()
