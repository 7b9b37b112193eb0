"""LoRA, and its relatives, fused into a pipeline's weights. Nothing is left for run time.

Every tensor of a file is used, by the definition of its own layer (`lora_layers`), or the file is refused by name.
Scales come from where a file says them: a layer's `alpha`, a PEFT folder's adapter_config.json, diffusers' metadata in
the header.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.arguments import real_number
from runtime.errors import InputError, first_line
from runtime.loading.lora_config import PEFT_PICKLE, read_configs, scale_of
from runtime.loading.lora_layers import new_weight
from runtime.loading.lora_names import PARTS, Layers, split_name
from runtime.loading.weights import content, load_pickle, tensor_shapes
from runtime.machine.files import expand

LoraSource = str | Path | tuple[str | Path, float]


@dataclass(frozen=True)
class Lora:
    """A LoRA file, checked.

    layers: how many layers of a model it adapts. configs: PEFT's configuration of the whole file (under ""), or of each
    part of the model.
    """

    path: Path
    weight: float
    layers: int
    configs: Mapping[str, Mapping] = field(default_factory=dict)


def find_lora(source: LoraSource, allow_pickle: bool = False) -> Lora:
    """Check a LoRA before anything large is loaded.

    source: a path, or (path, weight); a path is a file, PEFT's folder, or a folder with one .safetensors file. Raises
    InputError where the file is missing, truncated or has a tensor that is not a LoRA's, or the weight is not finite.
    Warns of a file of PEFT's that has lost its configuration, and with it the scale.
    """
    path, weight = _path_and_weight(source)
    path = _file_in(path) if path.is_dir() else path
    names = tensor_shapes(path, allow_pickle)
    configs = read_configs(path, names)
    layers = set()
    for name in names:
        try:
            layers.add(split_name(name)[0])
        except InputError as error:
            raise InputError(f"{path}: not a LoRA that can be read: {error}") from error
    if not layers:
        raise InputError(f"{path}: not a LoRA: no tensors in it")
    return Lora(path, weight, len(layers), configs)


def _file_in(folder: Path) -> Path:
    """Return the file in a folder: the one .safetensors, or the pickle that older versions of PEFT write."""
    files = sorted(folder.glob("*.safetensors"))
    if not files and (folder / PEFT_PICKLE).exists():
        return folder / PEFT_PICKLE
    if len(files) != 1:
        raise InputError(f"LoRA {folder}: {len(files)} .safetensors files in the folder, expected one")
    return files[0]


def _path_and_weight(source: LoraSource) -> tuple[Path, float]:
    pair = (source, 1.0) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], (str, os.PathLike)):
        raise InputError(f"LoRA {source!r}: expected a file, or (file, weight)")
    return expand(pair[0], "LoRA"), real_number(pair[1], f"LoRA {pair[0]}: weight")


def fuse_lora(pipe: StableDiffusionXLPipeline, lora: Lora) -> None:
    """Put a LoRA into the pipeline's weights, in place. Raises InputError where a layer of it does not fit."""
    parts = {part: getattr(pipe, part) for part in PARTS}
    base = (lora.configs.get("", {}).get("auto_mapping") or {}).get("base_model_class")
    layers, found = Layers(parts, base), {}
    for name, matrices in _read(lora.path).items():
        try:
            place = layers.find(name)
        except InputError as error:
            raise InputError(f"{lora.path}: {error}") from error
        if place is None:
            raise InputError(f"{lora.path}: a LoRA that does not fit this model: it has no layer {name}")
        if place in found:
            raise InputError(
                f"{lora.path}: {name} and another layer of the file are the same one of the model"
            )
        found[place] = (name, matrices)
    changed: list[tuple[nn.Parameter, Tensor]] = []
    for (part, path), (name, matrices) in found.items():
        layer, config = parts[part].get_submodule(path), lora.configs.get(part, lora.configs.get("", {}))
        try:
            new = _changes(layer, matrices, scale_of(config, part, path, matrices), lora.weight)
        except (ValueError, RuntimeError, LookupError, TypeError) as error:
            raise InputError(
                f"{lora.path}: a LoRA that does not fit this model: {name}: shape or kind: {first_line(error)}"
            ) from error
        if any(not made.to(old.dtype).isfinite().all() and old.isfinite().all() for old, made in new):
            raise InputError(f"{lora.path}: at weight {lora.weight:g} {name} is beyond {layer.weight.dtype}")
        changed += new
    with torch.no_grad():  # only now: a LoRA is in it whole or not at all
        for parameter, value in changed:
            parameter.copy_(value)


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return a file's matrices, float32, by layer and kind. Raises InputError where one is not finite, or twice."""
    tensors = load_file(path) if content(path) == "safetensors" else load_pickle(path)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, kind = split_name(name)
        if kind in layers[layer]:
            raise InputError(f"{path}: {name}: {layer} has two of its kind")
        if kind != "alpha" and not tensor.is_floating_point():
            raise InputError(f"{path}: {name}: {tensor.dtype}; expected floating-point numbers")
        if not tensor.float().isfinite().all():
            raise InputError(f"{path}: {name}: NaN or infinite values")
        layers[layer][kind] = tensor.float()
    return layers


def _changes(
    layer: nn.Module, matrices: Mapping[str, Tensor], scale: float | None, strength: float
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return a layer's parameters with the values that they are to have."""
    own = {kind: tensor.to(layer.weight.device) for kind, tensor in matrices.items()}
    changed = [(layer.weight, new_weight(layer.weight, own, scale, strength))]
    factors = {"diff_b": 1.0, "up_bias": 1.0 if scale is None else scale}
    shifts = [own[kind] * factor for kind, factor in factors.items() if kind in own]
    if shifts and getattr(layer, "bias", None) is None:
        raise ValueError("it has a bias, the layer has none")
    for shift in shifts:
        changed.append((layer.bias, layer.bias.float() + strength * shift.reshape(layer.bias.shape)))
    return changed
