"""Where an engine folder was found to compute what torch does: `verified.json` in it, an entry for each machine.

`export.build_engine` and `export.verify` compare and note the outcome; opening the folder on a machine of another kind
warns, and is refused on one where the comparison failed. Compilers choose their code by the processor: OpenVINO 2026.4
computed SDXL's self-attention rightly with AVX-512 and wrongly with AVX2 (see `engine_openvino`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch

from runtime.engines.base import package_version
from runtime.engines.manifest import NAME, Manifest
from runtime.errors import InputError
from runtime.machine.files import read_json, sha256, write_json
from runtime.machine.report import device_name

FILE = "verified.json"


def machine(manifest: Manifest, folder: Path, device: torch.device) -> dict[str, object]:
    """Return what a comparison is good for: these engines, this kind of processor, this version of the runtime."""
    name = device_name(device)
    if device.type == "cpu":  # its instructions, as torch was allowed to use them
        name += f", {torch.backends.cpu.get_cpu_capability()}"
    return {
        "manifest": sha256(folder / NAME),
        "device": name,
        "versions": package_version(manifest.target),
    }


def note(
    manifest: Manifest, folder: Path, device: torch.device, outcome: Mapping[str, object], passed: bool
) -> None:
    """Write the outcome of a comparison on this kind of machine, in place of an earlier one.

    outcome: what is worth telling of it, as JSON. Raises InputError where the folder cannot be written.
    """
    here = machine(manifest, folder, device)
    others = [entry for entry in entries(folder) if entry != entry | here]
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    machines = [*others, {**here, "passed": passed, **outcome, "date": date}]
    write_json({"machines": machines}, folder / FILE, FILE)


def noted(manifest: Manifest, folder: Path, device: torch.device) -> dict | None:
    """Return the outcome on this kind of machine; None where the engines were never compared on one."""
    here = machine(manifest, folder, device)
    return next((entry for entry in entries(folder) if entry == entry | here), None)


def check_verified(manifest: Manifest, folder: Path, device: torch.device) -> None:
    """Warn where the engines were never compared with torch on this kind of machine.

    Raises InputError where they were, and computed something else.
    """
    found, here = noted(manifest, folder, device), machine(manifest, folder, device)
    if found is None:
        warnings.warn(
            f"engine {folder}: not yet compared with torch on {here['device']}; "
            f"compare it: python -m export.verify {folder}",
            stacklevel=2,
        )
    elif found.get("passed") is not True:
        raise InputError(
            f"engine {folder}: computes something else than torch on {here['device']} ({found.get('worst')}); "
            f"run without --engine, or build for another target; {manifest.rebuild}"
        )


def entries(folder: Path) -> list[dict]:
    """Return what was noted; nothing where the file is missing or damaged."""
    try:
        found = read_json(folder / FILE).get("machines")
    except InputError:
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
