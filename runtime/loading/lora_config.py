"""PEFT's configuration of a LoRA: of the folder that PEFT writes, or of a file's header, where diffusers puts it."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from runtime.arguments import is_finite_number
from runtime.errors import InputError, first_line
from runtime.loading.lora_names import PARTS
from runtime.loading.weights import content
from runtime.machine.files import read_json, unique

PEFT_WEIGHTS, PEFT_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PEFT_CONFIG, PEFT_PREFIX = "adapter_config.json", "base_model.model."
PEFT_ALPHA = 8  # where a configuration leaves it out
HEADER = "lora_adapter_metadata"  # diffusers' key in a file's header
# Of a PEFT config: what says nothing of the weights, and what changes them beyond this module.
REFUSED = (
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "megatron_config",
    "alora_invocation_tokens",
    "kasa_config",
)
PLAIN = re.compile(r"[\w.]+")
# Of regular expressions that backtrack without end: a repeated group, and repetitions of more than digits
ENDLESS, REPEATS, MOST_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"(?:\.|\\[^d]|\])[*+{]"), 3
# PEFT's ways to begin a LoRA that take it out of the model's own weights: it is a difference to those that are left.
TAKEN_OUT = ("pissa", "corda", "olora", "loftq", "lora_ga")


def read_configs(path: Path, names: Iterable[str]) -> dict[str, dict]:
    """Return PEFT's configurations of a file: of the JSON file beside what PEFT wrote, or of the header.

    A configuration is of the whole file, under "", or of a part of the model. Raises InputError for one that asks for
    more than is done here; warns of a file of PEFT's that has lost it, and with it the scale.
    """
    by_peft = any(PEFT_PREFIX in name for name in names)
    beside = path.parent / PEFT_CONFIG
    if (by_peft or path.name in (PEFT_WEIGHTS, PEFT_PICKLE)) and beside.exists():
        configs = {"": read_json(beside)}
    else:
        configs = _header_configs(path) if content(path) == "safetensors" else {}
    for config in configs.values():
        _check_config(config, path)
    if by_peft and not configs and not any(name.endswith(".alpha") for name in names):
        warnings.warn(
            f"{path}: its scale is in PEFT's {PEFT_CONFIG}, which is not beside it; taken as 1", stacklevel=3
        )
    return configs


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
        flat = json.loads(text, object_pairs_hook=unique)
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
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(TAKEN_OUT):
        raise InputError(
            f"{path}: PEFT's {begun} changed the weights of the model that it is for; expected it converted "
            "(save_pretrained's path_initial_model_for_weight_conversion)"
        )
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
    for pattern in config.get("alpha_pattern") or {}:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{path}: its configuration's alpha_pattern {pattern!r}: {error}") from error
        if ENDLESS.search(pattern) or len(REPEATS.findall(pattern)) > MOST_REPEATS:
            raise InputError(
                f"{path}: its configuration's alpha_pattern {pattern!r} may take forever; expected no repeated group, "
                f"and at most {MOST_REPEATS} repetitions"
            )


def scale_of(config: Mapping, part: str, path: str, matrices: Mapping[str, Tensor]) -> float | None:
    """Return alpha / r of a layer, by the file's alpha or else PEFT's configuration; None where neither is there."""
    if "down" not in matrices or not (config or "alpha" in matrices):
        return None
    rank = len(matrices["down"])
    if not rank:
        raise ValueError("its rank is 0")
    if "alpha" in matrices:
        return matrices["alpha"].item() / rank
    return _alpha(config, part, path) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _alpha(config: Mapping, part: str, path: str) -> float:
    """Return a layer's alpha by the first of a configuration's patterns, which are for the end of its name, that fits.

    The name is the one it had where the LoRA was trained: in a part alone or in a pipeline, with "text_model." or not.
    """
    short = path.removeprefix("text_model.")
    names = [prefix + name for prefix in (f"{part}.", "") for name in (f"text_model.{short}", short)]
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if any(_fits(pattern, name) for name in names):
            return alpha
    return config.get("lora_alpha", PEFT_ALPHA)


def _fits(pattern: str, name: str) -> bool:
    """Return whether a pattern is the end of a layer's name, from a dot on: most are plain names, a thousand a file."""
    if PLAIN.fullmatch(pattern):
        return f".{name}".endswith(f".{pattern}")
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
