"""LoRA, fused into a pipeline's weights: W + weight * alpha / rank * up @ down. Nothing is left for run time."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from runtime.errors import InputError, first_line
from runtime.loading.weights import LOAD_ERRORS, tensor_shapes

# One matrix of each adapted layer, in the names of diffusers, peft, kohya.
DOWN = re.compile(r"(lora_down|lora\.down|lora_linear_layer\.down|lora_A)(\.\w+)?\.weight$")
NAME = "fused"

LoraSource = str | Path | tuple[str | Path, float]


@dataclass(frozen=True)
class Lora:
    """A LoRA file, checked; `layers`: how many layers of a model it adapts."""

    path: Path
    weight: float
    layers: int


def find_lora(source: LoraSource, allow_pickle: bool = False) -> Lora:
    """Check a LoRA before anything large is loaded.

    source: a path, or (path, weight); a path is a file, or a folder with one .safetensors file. Raises InputError
    where the file is missing, truncated or no LoRA, or the weight is not finite.
    """
    source, weight = (source, 1.0) if isinstance(source, (str, Path)) else source
    path = Path(source)
    if not math.isfinite(weight):
        raise InputError(f"LoRA {path}: weight {weight}, expected a finite number")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise InputError(f"LoRA {path}: {len(files)} .safetensors files in the folder, expected one")
        path = files[0]
    layers = sum(DOWN.search(name) is not None for name in tensor_shapes(path, allow_pickle))
    if not layers:
        raise InputError(f"{path}: not a LoRA: no down/up matrices in it")
    return Lora(path, float(weight), layers)


def fuse_lora(pipe: StableDiffusionXLPipeline, lora: Lora) -> None:
    """Add a LoRA to the pipeline's weights, in place; InputError where a layer of it does not fit the model."""
    refusal = f"{lora.path}: a LoRA that does not fit this model"
    try:
        # by path, not as tensors: the file's metadata may hold alpha
        pipe.load_lora_weights(
            str(lora.path.parent),
            weight_name=lora.path.name,
            adapter_name=NAME,
            use_safetensors=lora.path.suffix == ".safetensors",
            local_files_only=True,
        )
    except (*LOAD_ERRORS, IndexError) as error:
        raise InputError(f"{refusal}: {first_line(error)}") from error
    parts = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    fitting = sum(NAME in getattr(module, "lora_A", {}) for part in parts for module in part.modules())
    if fitting != lora.layers:  # diffusers leaves out what it does not find, and goes on
        raise InputError(f"{refusal}: {fitting} of its {lora.layers} layers are in it")
    pipe.fuse_lora(lora_scale=lora.weight, adapter_names=[NAME])
    pipe.unload_lora_weights()
