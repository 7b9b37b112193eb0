"""What regions are controlled by, T2I-Adapters and ControlNets: each source loaded as what its contents say."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, DiffusionPipeline, T2IAdapter
from torch import nn

from runtime.errors import InputError
from runtime.loading.adapter import find_adapter, load_adapter
from runtime.loading.controlnet import as_control, is_controlnet, load_controlnet, take
from runtime.loading.quiet import quiet
from runtime.machine.files import reads
from runtime.model.controlnet import ControlNet

AdapterSource = str | Path | T2IAdapter | ControlNetModel | ControlNetUnionModel
KINDS = (T2IAdapter, ControlNetModel, ControlNetUnionModel)
LISTED = ", ".join(kind.__name__ for kind in KINDS)
Controls = tuple[dict[str, T2IAdapter], dict[str, ControlNet]]


def named(sources: Mapping[str, AdapterSource]) -> Mapping[str, AdapterSource]:
    """Return the sources. Raises InputError where they are no mapping."""
    if not isinstance(sources, Mapping):
        raise InputError(f"adapters {sources!r}: expected names and their files, such as {{'canny': folder}}")
    return sources


def own_adapter(pipe: DiffusionPipeline) -> dict[str, AdapterSource]:
    """Return the adapter or ControlNet that a diffusers pipeline has itself, named "canny"; none where it has none.

    Raises InputError where it has several, or one of another kind.
    """
    own = getattr(pipe, "adapter", None) or getattr(pipe, "controlnet", None)
    if own is None:
        return {}
    if not isinstance(getattr(own, "_orig_mod", own), KINDS):
        raise InputError(
            f"{type(pipe).__name__}: a {type(own).__name__}; name each: adapters={{'canny': ...}}"
        )
    return {"canny": own}


@reads()
def load_controls(
    sources: Mapping[str, AdapterSource],
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    controlnet_home: str | torch.device | None = None,
) -> Controls:
    """Return every T2I-Adapter and every ControlNet by its name, in eval mode.

    A source that several names share is read once. controlnet_home: the device that ControlNets wait on, `device` by
    default. Raises InputError: see `adapter.load_adapter` and `controlnet.load_controlnet`.
    """
    adapters: dict[str, T2IAdapter] = {}
    controlnets: dict[str, ControlNet] = {}
    home = controlnet_home or device
    known: dict[object, ControlNet] = {}
    for name, given in named(sources).items():
        source = getattr(given, "_orig_mod", given)  # without torch.compile's cover
        if not isinstance(name, str) or not name:
            raise InputError(f"adapters: the name {name!r}; expected a text, such as 'canny'")
        if not isinstance(source, (str, os.PathLike, *KINDS)):
            kind = type(source).__name__
            raise InputError(f"adapter {name}: a {kind}; expected a folder, a file, a hub id, or a {LISTED}")
        label, key = f"adapter {name}", id(source)
        if isinstance(source, T2IAdapter):
            with quiet():
                adapters[name] = _own(source).to(device, dtype).eval()
            continue
        if not isinstance(source, (ControlNetModel, ControlNetUnionModel)):
            label = f"adapter {name} ({source})"
            key = path = find_adapter(str(source), label, allow_pickle)
            if not is_controlnet(path, allow_pickle):
                options = {"device": device, "dtype": dtype, "allow_pickle": allow_pickle, "name": name}
                adapters[name] = load_adapter(source, **options)
                continue
        if key in known:
            controlnets[name] = as_control(known[key], name, label)
        elif isinstance(source, (ControlNetModel, ControlNetUnionModel)):
            with quiet():
                controlnets[name] = take(source.to(home, dtype), name)
        else:
            options = {"device": home, "dtype": dtype, "allow_pickle": allow_pickle, "name": name}
            controlnets[name] = load_controlnet(source, **options)
        known.setdefault(key, controlnets[name])
    return adapters, controlnets


def _own(adapter: T2IAdapter) -> T2IAdapter:
    """Return one over the same weights, of which another pipeline's device and dtype leave the given one alone."""
    shared = {id(x): nn.Parameter(x.detach(), x.requires_grad) for x in adapter.parameters()}
    return copy.deepcopy(adapter, shared)
