"""The manifest of an engine folder: what was built, from what, for what, and the hash of every file.

`export.build_engine` writes `manifest.json` last. Reading it refuses what does not match: another format, a file that
was edited or cut short, other versions, another GPU. Nothing is used because a file of its name exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from runtime.engines.ports import GUIDANCE, SAMPLE, SHARES, Axis, Port, Profile
from runtime.errors import InputError, first_line
from runtime.machine.files import expand, read_json, reads, sha256, write_json

NAME = "manifest.json"
FORMAT = 3
MODEL_FILES = (
    "model"  # the subfolder with tokenizers, scheduler, the VAE's config and what runs in torch of the UNet
)
ADAPTER = "adapter_"  # an adapter's engine is called adapter_<its name>
KINDS = {  # the JSON type of each field
    **dict.fromkeys(("target", "precision", "command", "date"), str),
    **dict.fromkeys(("profile", "engines", "model", "adapters", "versions", "files", "stages"), dict),
    "compute_capabilities": list,
    "gpu": (str, type(None)),
    "refit": bool,
}


@dataclass(frozen=True)
class EngineSpec:
    """One compiled graph. Paths are relative to the folder, the first of `files` is the one to open.

    dtype: of its arithmetic. weights: hash of the weights it was made from. onnx: its ONNX file, where it was kept.
    layers: how many layers compute in each precision, read back from what was compiled (of TensorRT, from the strongly
    typed network, whose types an engine keeps: opening one takes a GPU).
    """

    files: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dtype: torch.dtype
    weights: str
    onnx: str | None
    layers: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """What is in an engine folder.

    model: source, vae, loras of the model, its sample_size, force_zeros_for_empty_prompt, and `weights`, a hash for
    each of its parts. adapters: the source of each. compute_capabilities: of the GPUs it was built for, none for a
    CPU. gpu: the one it was built on, where it runs on no other kind. refit: whether weights can be exchanged. files:
    size and sha256 of every file. stages: seconds, peak memory and bytes written of each step of the build. command:
    what built it.
    """

    target: str
    precision: str
    profile: Profile
    engines: Mapping[str, EngineSpec]
    model: Mapping[str, object]
    adapters: Mapping[str, str]
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    refit: bool
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, object]]
    stages: Mapping[str, Mapping[str, float]]
    command: str
    date: str

    @property
    def rebuild(self) -> str:
        """Return the end of an error's line: how to make the folder anew."""
        return f"rebuild it: {self.command}"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the folder's manifest, whole or not at all."""
    write_json({"format": FORMAT, **encode(asdict(manifest))}, folder / NAME, "manifest")


@reads()
def read_manifest(folder: str | Path) -> Manifest:
    """Return the folder's manifest; InputError, naming the field, where it is missing, of another
    format or not whole.
    """
    path = expand(folder) / NAME
    if not path.is_file():
        raise InputError(
            f"engine {folder}: no {NAME} in it; expected a folder that python -m export.build_engine finished"
        )
    data = read_json(path)
    if data.get("format") != FORMAT:
        command = data.get("command")
        remedy = f"rebuild it: {command}" if isinstance(command, str) else "rebuild the engines"
        raise InputError(f"{path}: format {data.get('format')!r}, this version reads {FORMAT}; {remedy}")
    try:
        given = {field.name: data[field.name] for field in fields(Manifest)}
        for name, kind in KINDS.items():
            if not isinstance(given[name], kind):
                expected = getattr(kind, "__name__", "str")
                raise TypeError(f"{name} is a {type(given[name]).__name__}, expected a {expected}")
        given["profile"] = parse_profile(given["profile"])
        given["engines"] = {name: parse_spec(spec) for name, spec in given["engines"].items()}
        given["compute_capabilities"] = tuple(given["compute_capabilities"])
        _check_unet(given["engines"])
        return Manifest(**given)
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]} is missing; expected an unedited manifest") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest: {first_line(error)}") from error


def adapter_names(manifest: Manifest) -> list[str]:
    """Return the adapters that were compiled."""
    return [name.removeprefix(ADAPTER) for name in manifest.engines if name.startswith(ADAPTER)]


def file_entry(path: Path) -> dict[str, object]:
    """Return a file's size and hash, as the manifest lists them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def check_files(manifest: Manifest, folder: Path, names: list[str]) -> None:
    """Raise InputError unless the named files are there, whole and unchanged."""
    for name in names:
        path, expected = folder / name, manifest.files.get(name)
        if expected is None:
            raise InputError(f"engine {folder}: files has no {name}; {manifest.rebuild}")
        if not path.is_file():
            raise InputError(f"engine {folder}: {name} is missing; {manifest.rebuild}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise InputError(
                f"engine {folder}: {name} has {size} bytes, the manifest says {expected['bytes']} (cut short or "
                f"edited); {manifest.rebuild}"
            )
        if file_entry(path) != dict(expected):
            raise InputError(f"engine {folder}: {name} was edited: its sha256 differs; {manifest.rebuild}")


def check_versions(manifest: Manifest, found: Mapping[str, str], exact: bool) -> None:
    """Raise InputError where the compiler's version is another than the one that built, or older unless `exact`."""
    for name, version in found.items():
        built = manifest.versions.get(name)
        if built == version or (not exact and built is not None and _number(built) <= _number(version)):
            continue
        if built is None:
            raise InputError(f"engine: versions has no {name}; {manifest.rebuild}")
        expected = built if exact else f"{built} or later"
        raise InputError(
            f"engine: built with {name} {built}, here is {version}; install {expected}, or {manifest.rebuild}"
        )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def encode(value):
    """Dataclasses' dictionaries as JSON: a dtype and an axis by their names."""
    if isinstance(value, dict):
        if set(value) == {"name", "divisor"}:
            return str(Axis(**value))
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def parse_profile(data: Mapping) -> Profile:
    """Return the inverse of `encode` for a profile."""
    ranges = {key: tuple(value) for key, value in data.items() if key != "guidance"}
    for key, value in ranges.items():
        if [type(size) for size in value] != [int] * 3:
            raise ValueError(f"{key} {list(value)}, expected three sizes")
    if data.get("guidance", "both") not in tuple(GUIDANCE):
        raise ValueError(f"guidance {data['guidance']!r}, expected {', '.join(GUIDANCE)}")
    return Profile(**{**data, **ranges})


def parse_spec(data: Mapping) -> EngineSpec:
    """Return the inverse of `encode` for an engine's specification."""
    ports = {side: tuple(_port(port) for port in data[side]) for side in ("inputs", "outputs")}
    rest = {field.name: data[field.name] for field in fields(EngineSpec) if field.name not in ports}
    return EngineSpec(**{**rest, **ports, "files": tuple(data["files"]), "dtype": _dtype(data["dtype"])})


def _check_unet(engines: Mapping[str, EngineSpec]) -> None:
    """Raise ValueError unless a UNet has a sample whose height follows the picture's, and its shares those of texts."""
    if "unet" not in engines:
        return
    shape = next((port.shape for port in engines["unet"].inputs if port.name == SAMPLE), ())
    if len(shape) != 4 or not isinstance(shape[2], Axis) or shape[2].divisor < 1:
        raise ValueError(
            f"the UNet's {SAMPLE} is of shape {shape}, expected rows, channels, height and width"
        )
    for port in engines["unet"].inputs:
        if port.name.startswith(SHARES) and (len(port.shape) != 4 or not isinstance(port.shape[1], int)):
            raise ValueError(
                f"the UNet's {port.name} is of shape {port.shape}, expected rows, texts, height and width"
            )


def _port(data: Mapping) -> Port:
    shape = tuple(size if isinstance(size, int) else Axis.parse(size) for size in data["shape"])
    if not isinstance(data["name"], str):
        raise ValueError(f"a port is called {data['name']!r}, expected a name")
    return Port(data["name"], _dtype(data["dtype"]), shape)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is not a dtype")
    return dtype
