"""Single files whose weights are float8 with a scale, as ComfyUI writes them; other quantised files are named.

A layer's weight is the number times `<layer>.scale_weight`, or `<layer>.weight_scale`: one scale, or one an output.
What the numbers are is said by `<layer>.comfy_quant`, or by the file's header of all layers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from runtime.errors import InputError, first_line
from runtime.loading.lora_names import original_names
from runtime.loading.weights import header, integer_weights, read_tensors
from runtime.machine.files import unique

SCALES = (".scale_weight", ".weight_scale")
# Of activations, which are not in float8 here; what the weights are, which the file itself says.
LEFT = (".scale_input", ".input_scale")
MARKER, FORMAT, HEADER = "scaled_fp8", ".comfy_quant", "_quantization_metadata"
PLAIN = ("format", "full_precision_matrix_mult")  # of a description: what says nothing of the weights
QUANTISED = {  # a part of a tensor's name -> the kind of file
    "quant_state.bitsandbytes": "a bitsandbytes (nf4, fp4) model",
    ".absmax": "a bitsandbytes model",
    ".qweight": "a GPTQ, AWQ or nunchaku model",
    ".wscales": "a nunchaku (SVDQuant) model",
    ".weight_scale_2": "an NVFP4 model",
}
READ = "expected fp32, fp16 or bf16, or scaled fp8 in a single file"
UNET, TEXT = "model.diffusion_model.", "conditioner.embedders.0.transformer."


def check_quantised(path: Path, names: Collection[str]) -> None:
    """Raise InputError, saying what it is, for a file whose weights are numbers that are not read here."""
    for part, kind in QUANTISED.items():
        if found := next((name for name in names if part in name), None):
            raise InputError(f"{path}: {kind} ({found}), which is not read; {READ}")
    for name in integer_weights(path):
        layer = name.removesuffix(".weight")
        if name in names and not any(layer + scale in names for scale in SCALES):
            raise InputError(f"{path}: {name} is in whole numbers without a scale; {READ}")


def check_plain(path: Path, names: Collection[str]) -> None:
    """Raise InputError for a file whose weights mean something only with a scale: `apply_scales` does not know it."""
    check_quantised(path, names)
    found = next((name for name in names if name.endswith((*SCALES, *LEFT, FORMAT))), None)
    in_header = (f"{HEADER} of {layer}" for layer in _said_in_header(path) if f"{layer}.weight" in names)
    if found := found or next(in_header, None):
        raise InputError(f"{path}: weights with scales ({found}), which are not read here; {READ}")


def apply_scales(path: Path, pipe: StableDiffusionXLPipeline, names: Collection[str]) -> None:
    """Multiply the weights that were loaded from a file by its scales, in place, rounded once.

    Raises InputError where a scale is of no layer or does not fit it, or weights are said to be in another format.
    """
    scaled = [name for name in names if name.endswith(SCALES)]
    described = [name for name in names if name.endswith(FORMAT)]
    in_header = _said_in_header(path)
    if not scaled and not described and not in_header:
        return
    values = read_tensors(path, [*scaled, *described])
    said = [(f"{HEADER} of {layer}", layer, value) for layer, value in in_header.items()]
    said += [(name, name.removesuffix(FORMAT), _json_of(path, name, values[name])) for name in described]
    for name, layer, value in said:
        _check_format(path, name, value)
        if not any(layer + scale in names for scale in SCALES):
            raise InputError(f"{path}: {name}: weights in float8 without their scale; expected {SCALES[1]}")
    layers = {
        f"{UNET}{original}": pipe.unet.get_submodule(own) for original, own in original_names(pipe.unet)
    }
    texts = {name.removeprefix("text_model."): layer for name, layer in pipe.text_encoder.named_modules()}
    for name in scaled:
        place = name.rpartition(".")[0]
        layer = layers.get(place, texts.get(place.removeprefix(TEXT).removeprefix("text_model.")))
        if getattr(layer, "weight", None) is None:
            raise InputError(f"{path}: {name}: the scale of a layer that is not known here")
        if len([place + kind for kind in SCALES if place + kind in names]) > 1:
            raise InputError(f"{path}: {name}: the layer has two scales; expected one of {', '.join(SCALES)}")
        with torch.no_grad():
            _multiply(path, name, layer.weight, values[name])


def _multiply(path: Path, name: str, weight: nn.Parameter, scale: Tensor) -> None:
    scale, outputs = scale.float(), len(weight)
    one_each = scale.numel() == outputs and scale.shape[:1] == (outputs,)  # not one an input, nor one a block
    if not (scale.numel() == 1 or one_each) or not scale.isfinite().all():
        raise InputError(
            f"{path}: {name}: scales of shape {tuple(scale.shape)}; expected a finite one, or {outputs}"
        )
    weight.copy_(weight.float() * scale.reshape(-1, *[1] * (weight.ndim - 1)).to(weight.device))


def _said_in_header(path: Path) -> Mapping[str, object]:
    """Return what a file's header says of its layers' weights, by layer; nothing where it does not."""
    text = header(path).get(HEADER)
    if text is None:
        return {}
    try:
        layers = json.loads(text, object_pairs_hook=unique)["layers"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise InputError(
            f"{path}: its header's {HEADER} is not JSON with layers: {first_line(error)}"
        ) from error
    if not isinstance(layers, Mapping):
        raise InputError(f"{path}: its header's {HEADER} has layers {str(layers)[:80]}; expected an object")
    return layers


def _json_of(path: Path, name: str, value: Tensor) -> object:
    try:
        return json.loads(bytes(value.to(torch.uint8).flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {name}: not JSON: {first_line(error)}") from error


def _check_format(path: Path, name: str, described: object) -> None:
    """Raise InputError unless a layer's description says float8."""
    described = described if isinstance(described, Mapping) else {"format": described}
    kind = described.get("format")
    if not str(kind).startswith("float8"):
        raise InputError(f"{path}: {name}: weights in {kind}, which is not read; expected float8")
    if more := [key for key, value in described.items() if key not in PLAIN and value]:
        raise InputError(f"{path}: {name}: weights with {more[0]}, which is not read; expected plain float8")
