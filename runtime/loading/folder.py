"""SDXL in diffusers' folder layout: checked part by part, then loaded into a StableDiffusionXLPipeline."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from runtime.arguments import is_finite_number
from runtime.errors import InputError, first_line
from runtime.loading.scaled import READ, check_plain
from runtime.loading.weights import LOAD_ERRORS, chosen_weights, find_weights
from runtime.machine.files import read_json
from runtime.model.config import UNetConfig

MODELS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
EXPECTED = "expected an SDXL text-to-image model"


def load_folder(
    folder: Path, *, dtype: torch.dtype, vae: AutoencoderKL | None = None, allow_pickle: bool = False
) -> StableDiffusionXLPipeline:
    """Load a diffusers SDXL folder, the VAE in float32 (or the one given), all else in `dtype`.

    Raises InputError where a file is missing, truncated or does not fit, or the folder holds another kind of
    model.
    """
    check_folder(folder)
    parts = {"vae": vae} if vae is not None else {}
    dtypes = {part: torch.float32 if part == "vae" else dtype for part in MODELS if part not in parts}
    for part in dtypes:  # all of them before the first is read
        find_weights(folder / part, dtypes[part], allow_pickle)
    for part in dtypes:
        parts[part] = load_component(MODELS[part], folder / part, dtypes[part], allow_pickle)
    try:
        # What else a folder may list is not used, and not opened.
        others = {"image_encoder": None, "feature_extractor": None}
        return StableDiffusionXLPipeline.from_pretrained(folder, **parts, **others, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{folder}: tokenizer or scheduler not readable: {first_line(error)}") from error


def load_component(
    model_class: type[nn.Module],
    folder: Path,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Load one model from its folder; InputError unless its files are whole and hold every weight of it.

    Weights that the model has no place for are left out with a warning, or refused where it is strict.
    """
    if quantised := read_json(folder / "config.json").get("quantization_config"):
        method = quantised.get("quant_method", "8 bits") if isinstance(quantised, Mapping) else quantised
        raise InputError(f"{folder}: its weights are quantised ({method}), which is not read; {READ}")
    files, chosen = chosen_weights(folder, dtype, allow_pickle)
    for file, shapes in files.items():
        check_plain(file, shapes)
    try:
        model, info = model_class.from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # told of below, with the name
            output_loading_info=True,
            **chosen,
        )
    except LOAD_ERRORS as error:
        raise InputError(f"{folder}: {model_class.__name__} not readable: {first_line(error)}") from error
    # the loaders fill a missing weight with random numbers
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder}: {len(missing)} weights of config.json's model missing, first {missing[0]}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise InputError(f"{folder}: {name} is {list(found)}, config.json's model expects {list(expected)}")
    if unexpected := sorted(info["unexpected_keys"]):
        said = f"{folder}: {len(unexpected)} weights unknown to config.json's model"
        if strict:
            raise InputError(f"{said}, first {unexpected[0]}; expected none")
        warnings.warn(f"{said} left out, first {unexpected[0]}", stacklevel=2)
    return model


def check_folder(folder: Path) -> None:
    """Raise InputError unless the folder's configs are an SDXL text-to-image model's, its tokenizers there."""
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: model_index.json missing, {EXPECTED} in diffusers' folder layout")
    index = read_json(folder / "model_index.json")
    check_index(index, folder)
    configs = {part: read_json(folder / part / "config.json") for part in MODELS}
    check_configs(folder, **configs)
    for part in TOKENIZERS:
        if not has_vocabulary(folder / part):
            raise InputError(
                f"{folder / part}: tokenizer missing, expected tokenizer.json or vocab.json and merges.txt"
            )


def check_index(index: Mapping, folder: Path) -> None:
    """Raise InputError, saying what the pipeline is, unless model_index.json lists SDXL's parts."""
    parts = {part: _listed(index, part, folder) for part in (*MODELS, *TOKENIZERS, "scheduler")}
    absent = [part for part, class_name in parts.items() if class_name is None]
    if absent:
        refiner = absent == ["text_encoder", "tokenizer"]
        kind = "the SDXL refiner" if refiner else f"a {index.get('_class_name', 'pipeline')}"
        raise InputError(f"{folder}: {kind}, without {', '.join(absent)}; {EXPECTED}")
    for part, model_class in MODELS.items():
        if parts[part] != model_class.__name__:
            raise InputError(f"{folder}: its {part} is a {parts[part]}, expected {model_class.__name__}")


def _listed(index: Mapping, part: str, folder: Path) -> str | None:
    """Return the class that model_index.json lists for a part, None for none."""
    listed = index.get(part) or [None, None]
    if not isinstance(listed, list) or len(listed) != 2 or not isinstance(listed[1], (str, type(None))):
        raise InputError(f"{folder}: model_index.json: {part} is {listed!r}; expected [library, class]")
    return listed[1]


def check_configs(
    source: object, unet: Mapping, vae: Mapping, text_encoder: Mapping, text_encoder_2: Mapping
) -> None:
    """Raise InputError, naming `source`, unless the four configs belong to one SDXL text-to-image model."""
    try:
        config = UNetConfig.from_diffusers(unet)
    except InputError as error:
        raise InputError(f"{source}: {error}; {EXPECTED}") from error
    latent = vae.get("latent_channels", 4)
    if type(latent) is not int:
        raise InputError(f"{source}: the VAE's latent_channels is {latent!r}; expected a whole number")
    check_channels(source, config.in_channels, latent)
    _check_scale(source, vae, latent)
    texts = [
        _text_config(source, name, given)
        for name, given in (("text_encoder", text_encoder), ("text_encoder_2", text_encoder_2))
    ]
    width = sum(text.hidden_size for text in texts)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    if config.cross_attention_dim != width or pooled != texts[1].projection_dim:
        raise InputError(
            f"{source}: the UNet expects {config.cross_attention_dim} text features and {pooled} pooled, "
            f"the text encoders give {width} and {texts[1].projection_dim}; {EXPECTED}"
        )


def _check_scale(source: object, vae: Mapping, latent: int) -> None:
    """Raise InputError unless a VAE's config says numbers of what its latents are multiplied by, or lessened."""
    factor = vae.get("scaling_factor", 1.0)
    if not is_finite_number(factor) or not factor:
        raise InputError(f"{source}: the VAE's scaling_factor is {factor!r}; expected a number other than 0")
    for key in ("latents_mean", "latents_std"):
        values = vae.get(key)
        fits = isinstance(values, (list, tuple)) and len(values) == latent
        if values is not None and not (fits and all(map(is_finite_number, values))):
            raise InputError(f"{source}: the VAE's {key} is {values!r}; expected {latent} numbers")


def _text_config(source: object, name: str, given: Mapping) -> CLIPTextConfig:
    try:
        return CLIPTextConfig(**given)
    except Exception as error:  # its checks raise a dozen types
        raise InputError(f"{source}: {name}'s config: {' '.join(str(error).split())}; {EXPECTED}") from error


def check_channels(source: object, channels: int, latent: int) -> None:
    """Raise InputError, saying what the model is, unless its UNet takes the latent and nothing else."""
    if channels != latent:
        kinds = {2 * latent + 1: "an inpainting model", 2 * latent: "an image-editing model"}
        kind = kinds.get(channels, "a UNet of another model")
        raise InputError(
            f"{source}: {kind}: it takes {channels} channels, the latent has {latent}; {EXPECTED}"
        )


def has_vocabulary(folder: Path) -> bool:
    """Return whether a tokenizer's own files are there: without them transformers makes an empty tokenizer."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )
