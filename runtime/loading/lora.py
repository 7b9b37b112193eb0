"""LoRA, and its relatives, fused into a pipeline's weights. Nothing is left for run time.

Every tensor of a file is used, by the definition of its own layer (`lora_layers`), or the file is refused by name.
Scales come from where a file says them: a layer's `alpha`, a PEFT folder's adapter_config.json, diffusers' metadata in
the header.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.arguments import is_finite_number, real_number
from runtime.errors import InputError, first_line
from runtime.loading.lora_layers import new_weight
from runtime.loading.lora_names import PARTS, Layers, split_name
from runtime.loading.weights import content, load_pickle, tensor_shapes
from runtime.machine.files import read_json

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADER = "lora_adapter_metadata"  # diffusers' key in a file's header
# Of a PEFT config: what says nothing of the weights, and what changes them beyond this module.
REFUSED = (
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "megatron_config",
    "alora_invocation_tokens",
)

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
    """
    path, weight = _path_and_weight(source)
    configs = {}
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise InputError(f"LoRA {path}: {len(files)} .safetensors files in the folder, expected one")
        path = files[0]
    if path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).exists():
        configs = {"": read_json(path.parent / PEFT_CONFIG)}
    elif path.is_file() and content(path) == "safetensors":
        configs = _header_configs(path)
    for config in configs.values():
        _check_config(config, path)
    names = tensor_shapes(path, allow_pickle)
    layers = set()
    for name in names:
        try:
            layers.add(split_name(name)[0])
        except InputError as error:
            raise InputError(f"{path}: not a LoRA that can be read: {error}") from error
    if not layers:
        raise InputError(f"{path}: not a LoRA: no tensors in it")
    return Lora(path, weight, len(layers), configs)


def _path_and_weight(source: LoraSource) -> tuple[Path, float]:
    pair = (source, 1.0) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], (str, os.PathLike)):
        raise InputError(f"LoRA {source!r}: expected a file, or (file, weight)")
    return Path(pair[0]), real_number(pair[1], f"LoRA {pair[0]}: weight")


def fuse_lora(pipe: StableDiffusionXLPipeline, lora: Lora) -> None:
    """Put a LoRA into the pipeline's weights, in place. Raises InputError where a layer of it does not fit."""
    parts = {part: getattr(pipe, part) for part in PARTS}
    base = (lora.configs.get("", {}).get("auto_mapping") or {}).get("base_model_class")
    layers, found = Layers(parts, base), {}
    for name, matrices in _read(lora.path).items():
        place = layers.find(name)
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
            changed += _changes(layer, matrices, _scale(config, path, matrices), lora.weight)
        except (ValueError, RuntimeError, LookupError, TypeError) as error:
            raise InputError(
                f"{lora.path}: a LoRA that does not fit this model: {name}: shape or kind: {first_line(error)}"
            ) from error
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
    shifts = [
        own[kind] * factor for kind, factor in (("diff_b", 1.0), ("up_bias", scale or 1.0)) if kind in own
    ]
    if shifts and getattr(layer, "bias", None) is None:
        raise ValueError("it has a bias, the layer has none")
    for shift in shifts:
        changed.append((layer.bias, layer.bias.float() + strength * shift.reshape(layer.bias.shape)))
    return changed


def _scale(config: Mapping, path: str, matrices: Mapping[str, Tensor]) -> float | None:
    """Return alpha / r of a layer by PEFT's configuration; None where there is none, or the file has its alpha."""
    if not config or "lora_alpha" not in config or "down" not in matrices:
        return None
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), path), config["lora_alpha"])
    rank = len(matrices["down"])
    if not rank:
        raise ValueError("its rank is 0")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _header_configs(path: Path) -> dict[str, dict]:
    """Return what diffusers wrote of PEFT's configuration into a file's header: a configuration for each part."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
    except Exception:  # a damaged file: `tensor_shapes` says so
        return {}
    if text is None:
        return {}
    try:
        flat = json.loads(text)
        items = list(flat.items())
    except (ValueError, RecursionError, AttributeError) as error:
        raise InputError(f"{path}: its header's {HEADER} is not JSON: {first_line(error)}") from error
    configs: dict[str, dict] = defaultdict(dict)
    for name, value in items:
        part, _, key = name.partition(".")
        configs[part if part in PARTS else ""][key if part in PARTS else name] = value
    return dict(configs)


def _check_config(config: Mapping, path: Path) -> None:
    """Raise InputError for a PEFT configuration that asks for more than is done here."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{path}: PEFT's {kind}; expected LORA")
    for name in REFUSED:
        if config.get(name):
            raise InputError(f"{path}: its configuration has {name}, which is not read")
    for name in ("rank_pattern", "alpha_pattern", "auto_mapping"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{path}: its configuration's {name} is {config[name]!r}; expected an object")
    alphas = {f"alpha_pattern of {key}": value for key, value in (config.get("alpha_pattern") or {}).items()}
    if "lora_alpha" in config:
        alphas["lora_alpha"] = config["lora_alpha"]
    for name, value in alphas.items():
        if not is_finite_number(value):
            raise InputError(f"{path}: its configuration's {name} is {value!r}; expected a number")
    if config.get("fan_in_fan_out"):
        raise InputError(f"{path}: its configuration has fan_in_fan_out, which no layer of SDXL has")
