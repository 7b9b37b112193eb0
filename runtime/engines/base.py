"""Compiled graphs behind one interface: bound once for each size, then run without copies.

engine = open_engine(manifest, folder, "unet", device)
bound = engine.bind(rows=2, height=1024, width=1024)
bound.inputs["sample"].copy_(sample); bound.run(); bound.outputs["prediction"]
"""

from __future__ import annotations

import importlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from runtime.engines.manifest import MODEL_FILES, EngineSpec, Manifest, check_files, check_versions
from runtime.engines.ports import Port, Profile
from runtime.engines.targets import TARGETS
from runtime.errors import InputError

# Sizes of an engine that are kept: of two of pictures with and without guidance, or of one of many numbers of rows
BINDINGS = 8


@dataclass(eq=False)
class Binding:
    """One size of an engine: tensors to fill, tensors that `run` fills; they stay the same ones.

    owner: whoever filled the inputs last, and may find them as it left them.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    run: Callable[[], None]
    owner: object = None


class Engine(ABC):
    """One compiled graph on one device.

    A call is safe from several threads. Who uses a binding itself holds `lock` from filling it to reading its outputs.
    """

    by_size = False  # whether each size is compiled or captured for itself

    def __init__(self, spec: EngineSpec, profile: Profile, device: torch.device):
        self.spec, self.profile, self.device = spec, profile, device
        self.lock = threading.RLock()
        self._bindings: OrderedDict[tuple, Binding] = OrderedDict()

    def rows_for(self, rows: int) -> int:
        """Return how many rows are best run for so many of several requests, which come and go.

        As many; but 2^k or 3 * 2^k of an engine that compiles or captures each size for itself, so that few are.
        """
        if not self.by_size:
            return rows
        double = 1 << (rows - 1).bit_length()
        return min(double if rows > 3 * double // 4 else 3 * double // 4, self.profile.range("rows")[2])

    def bind(self, **sizes: int) -> Binding:
        """Return the tensors for a call of these sizes (rows, items, height, width: those its inputs depend on).

        Allocated at the first call of a size, and freed where BINDINGS others were used since. Raises InputError where
        a size is outside the profile.
        """
        key = tuple(sorted(sizes.items()))
        if key not in self._bindings:
            self.profile.check(sizes)
            while len(self._bindings) >= BINDINGS:
                self._bindings.popitem(last=False)
            with torch.inference_mode(False):  # they are used in and outside of it
                inputs, outputs = (
                    self._allocate(ports, sizes) for ports in (self.spec.inputs, self.spec.outputs)
                )
            self._bindings[key] = Binding(inputs, outputs, self._bind(inputs, outputs))
        self._bindings.move_to_end(key)
        return self._bindings[key]

    def _allocate(self, ports: tuple[Port, ...], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {
            port.name: torch.zeros(port.sized(sizes), dtype=port.dtype, device=self.device) for port in ports
        }

    def __call__(self, inputs: Mapping[str, Tensor], **sizes: int) -> dict[str, Tensor]:
        """Copy in, run, copy out."""
        with self.lock:
            bound = self.bind(**sizes)
            for name, tensor in inputs.items():
                bound.inputs[name].copy_(tensor)
            bound.run()
            return {name: tensor.clone() for name, tensor in bound.outputs.items()}

    @abstractmethod
    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a function that reads these tensors and writes those."""


def open_engine(
    manifest: Manifest,
    folder: Path,
    name: str,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
) -> Engine:
    """Open one engine of a folder whose manifest was checked (`check_folder`).

    weights: others in place of those it was built with, by parameter name; the files stay as they are. Raises
    InputError where the engine cannot be opened, or weights are given and it was not built with --refit.
    """
    spec = manifest.engines[name]
    if weights and not manifest.refit:
        raise InputError(
            f"engine {folder}: it was built without --refit, so no weight can be exchanged; {manifest.rebuild}"
        )
    module = {"tensorrt-rtx": "tensorrt"}.get(manifest.target, manifest.target)
    backend = importlib.import_module(f"runtime.engines.{module}")
    return backend.open_engine(manifest, spec, folder / spec.files[0], device, weights or {})


def check_folder(manifest: Manifest, folder: Path, device: torch.device) -> None:
    """Raise InputError unless the engines can run here: package, its version, GPU, and every engine's files."""
    target = TARGETS.get(manifest.target)
    if target is None:
        raise InputError(
            f"engine {folder}: target {manifest.target!r} is unknown; expected {', '.join(TARGETS)}"
        )
    check_device(manifest, device)
    check_versions(manifest, package_version(manifest.target), exact=not target.portable)
    check_contents(manifest, folder)


def check_contents(manifest: Manifest, folder: Path) -> None:
    """Raise InputError unless every file that a pipeline needs is whole and unchanged: engines and the model's
    configs.
    """
    used = [file for spec in manifest.engines.values() for file in spec.files]
    check_files(
        manifest, folder, used + [file for file in manifest.files if file.startswith(f"{MODEL_FILES}/")]
    )


def package_version(target: str) -> dict[str, str]:
    """Return the target's package and its version; InputError, saying what to install, where it is missing."""
    package, extra = TARGETS[target].package, TARGETS[target].extra
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"target {target} needs the package {package}; install it: pip install 'localcontrol[{extra}]'"
        ) from error
    return {package: getattr(module, "__version__", None) or metadata.version(package)}


def check_device(manifest: Manifest, device: torch.device) -> None:
    """Raise InputError where the engines were built for other hardware than `device`."""
    if TARGETS[manifest.target].gpu and device.type != "cuda":
        raise InputError(
            f"engine: target {manifest.target} needs a CUDA device, got {device}; {manifest.rebuild}"
        )
    if not manifest.compute_capabilities:
        return
    name = torch.cuda.get_device_name(device)
    if manifest.gpu not in (None, name):
        raise InputError(f"engine: gpu {manifest.gpu}, this one is {name}; {manifest.rebuild}")
    found = ".".join(map(str, torch.cuda.get_device_capability(device)))
    if found not in manifest.compute_capabilities:
        built = ", ".join(manifest.compute_capabilities)
        raise InputError(
            f"engine: compute_capabilities {built}, this GPU ({name}) has {found}; {manifest.rebuild}"
        )
