"""SDXL in one file of the original layout, as most fine-tuned models are published.

The file has the weights only (model.diffusion_model.*, conditioner.embedders.0 and 1, first_stage_model.*).
The configs are SDXL's own (runtime/configs/sdxl); the tokenizers' vocabulary comes from a folder or from
Hugging Face's cache.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import constants
from torch import nn
from transformers import CLIPTokenizer

from runtime.errors import InputError, first_line
from runtime.loading.accounting import check_names, check_vae_names
from runtime.loading.folder import EXPECTED, TOKENIZERS, check_channels, has_vocabulary
from runtime.loading.hub import fetch_files
from runtime.loading.scaled import apply_scales, check_quantised
from runtime.loading.weights import LOAD_ERRORS, header, read_tensor, tensor_shapes, with_suffix
from runtime.machine.files import read_json

SDXL_CONFIGS = Path(__file__).parents[1] / "configs" / "sdxl"
# What SDXL's two tokenizers, otherwise the same, fill a short prompt up with: the end token, and id 0.
PADDING = ("<|endoftext|>", "!")
# CLIP's vocabulary on the hub, and where its files are in each repository
VOCABULARIES = {
    "stabilityai/stable-diffusion-xl-base-1.0": TOKENIZERS,
    "openai/clip-vit-large-patch14": ("", ""),
}

UNET, TEXT_1, TEXT_2, VAE = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "conditioner.embedders.1.model.positional_embedding",
    "first_stage_model.decoder.conv_in.weight",
)
PROJECTION = "conditioner.embedders.1.model.text_projection"
# modelspec's names in a file's header -> diffusers'
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon"} | dict.fromkeys(
    ("v", "v_prediction", "v_pred", "vpred"), "v_prediction"
)
# A part of a tensor's name -> the kind of file it is in. First SDXL's layout with another noise schedule,
VARIANTS = {"edm_mean": "a Playground v2.5 model", "edm_vpred.": "a CosXL model"}
# then other files; the first that fits counts.
OTHER_KINDS = {
    "lora_": "a LoRA (pass it as one of loras)",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "cond_stage_model.model.": "a Stable Diffusion 2 model",
    "cond_stage_model.": "a Stable Diffusion 1 model",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a Flux model",
    "control_model.": "a ControlNet",
    "body.0.resnets.": "a T2I-Adapter (pass it as an adapter)",
    "down_blocks.": "one part of a model in diffusers' layout",
}


def load_single_file(
    path: Path,
    *,
    dtype: torch.dtype,
    vae: AutoencoderKL | None = None,
    allow_pickle: bool = False,
    tokenizer: Path | None = None,
    config: Path | None = None,
) -> StableDiffusionXLPipeline:
    """Load a file in the original SDXL layout, the VAE in float32 (or the one given), all else in `dtype`.

    config: a folder with configs in diffusers' layout, instead of SDXL's. tokenizer: see `load_tokenizers`.
    Raises InputError where the file is truncated, incomplete, or of another kind of model.
    """
    shapes = tensor_shapes(path, allow_pickle)
    check_quantised(path, shapes)
    config = config or SDXL_CONFIGS
    check_layout(path, shapes, vae_needed=vae is None)
    check_channels(path, shapes[UNET][1], read_json(config / "unet" / "config.json").get("in_channels", 4))
    tokenizers = load_tokenizers(tokenizer or config, search=tokenizer is None)
    vae = vae or load_vae_file(path, config / "vae", allow_pickle)
    try:
        with with_suffix(path) as named:
            pipe = StableDiffusionXLPipeline.from_single_file(
                str(named),
                config=str(config),
                torch_dtype=dtype,
                vae=vae,
                local_files_only=True,
                **dict(zip(TOKENIZERS, tokenizers, strict=True)),
            )
    except (SingleFileComponentError, *LOAD_ERRORS) as error:
        raise InputError(f"{path}: does not fit SDXL's layout: {_reason(error)}") from error
    place_projection(path, pipe.text_encoder_2, shapes)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        check_loaded(path, getattr(pipe, part))
    apply_scales(path, pipe, shapes)
    check_names(path, pipe, shapes)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, **declared_schedule(path, shapes)
    )
    return pipe


def declared_schedule(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """Return the scheduler's options that a file declares: by marker tensors, or modelspec's field in its header.

    Raises InputError for a prediction type that is not known.
    """
    options: dict[str, object] = {}
    if (declared := header(path).get("modelspec.prediction_type")) is not None:
        spelled = declared.strip().lower().replace("-", "_")
        if spelled not in PREDICTIONS:
            raise InputError(
                f"{path}: its header says prediction_type {declared!r}; expected {', '.join(PREDICTIONS)}"
            )
        options["prediction_type"] = PREDICTIONS[spelled]
    if "v_pred" in shapes:
        options["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:  # the noise schedule ends at zero SNR
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return options


def place_projection(path: Path, encoder: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put the second encoder's text projection into its layer, in place.

    OpenCLIP's parameter `text_projection` is (width, projected), a linear layer's `text_projection.weight`, as other
    programs save it, (projected, width). Where the two differ, the shape tells; diffusers knows the parameter only.
    """
    names = [name for name in (PROJECTION, PROJECTION + ".weight") if name in shapes]
    if not names:
        return
    layer = encoder.text_projection
    value = read_tensor(path, names[-1])
    wanted = (layer.out_features, layer.in_features)
    as_linear = names[-1].endswith(".weight") if wanted[0] == wanted[1] else tuple(value.shape) == wanted
    value = value if as_linear else value.T
    if tuple(value.shape) != wanted:
        raise InputError(f"{path}: {names[-1]}: {tuple(value.shape)}; expected {wanted}")
    dtype = encoder.text_model.final_layer_norm.weight.dtype
    layer.weight = nn.Parameter(value.to(dtype).contiguous(), requires_grad=layer.weight.requires_grad)


def load_vae_file(path: Path, config: Path, allow_pickle: bool = False) -> AutoencoderKL:
    """Load a VAE in float32 from a file in diffusers' or the original layout, or out of a whole single file."""
    names = tensor_shapes(path, allow_pickle)
    try:
        with with_suffix(path) as named:
            vae = AutoencoderKL.from_single_file(
                str(named), config=str(config), torch_dtype=torch.float32, local_files_only=True
            )
    except (SingleFileComponentError, *LOAD_ERRORS) as error:
        raise InputError(f"{path}: not a VAE of this model: {_reason(error)}") from error
    check_loaded(path, vae)
    check_vae_names(path, vae, names)
    return vae


def check_loaded(path: Path, model: nn.Module) -> None:
    """Raise InputError where diffusers left weights out: they stay on the meta device, without values."""
    missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} weights of the {type(model).__name__} missing, first {missing[0]}"
        )


def _reason(error: Exception) -> str:
    """Return what an error of diffusers' conversion means: a KeyError is only a name, a missing
    weight a meta tensor.
    """
    if isinstance(error, KeyError):
        return f"no {error.args[0]} in it"
    return "a weight is missing" if "meta tensor" in str(error) else first_line(error)


def check_layout(path: Path, shapes: Mapping[str, tuple[int, ...]], vae_needed: bool = True) -> None:
    """Raise InputError, saying what the file is, unless it is an SDXL model in the original layout."""
    markers = [UNET, TEXT_1, TEXT_2, *([VAE] if vae_needed else [])]
    missing = [name for name in markers if name not in shapes]
    if missing == [VAE]:
        raise InputError(f"{path}: it has no VAE; pass one: --vae, or vae=")
    if UNET in shapes and missing == [TEXT_1, TEXT_2, *([VAE] if vae_needed else [])]:
        raise InputError(
            f"{path}: a UNet alone, without text encoders; {EXPECTED} in the original single-file layout"
        )
    for part, kind in (OTHER_KINDS if missing else VARIANTS).items():
        if any(part in name for name in shapes):
            raise InputError(f"{path}: {kind}; {EXPECTED}")
    if missing:
        raise InputError(f"{path}: no {missing[0]} in it; {EXPECTED} in the original single-file layout")


def load_tokenizers(folder: Path, *, search: bool = True) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """SDXL's two tokenizers, from a folder; else, to search on, from Hugging Face's cache or, online, the hub.

    folder: holds tokenizer/ and tokenizer_2/, or CLIP's vocab.json and merges.txt, which serve both. Raises
    InputError that says which files to put where.
    """
    for place, parts in _vocabularies(folder, search):
        if all(has_vocabulary(place / part) for part in parts):
            first, second = (
                _read_tokenizer(place / part, pad) for part, pad in zip(parts, PADDING, strict=True)
            )
            return first, second
    looked = f"{constants.HF_HUB_CACHE} ({' or '.join(VOCABULARIES)})" if search else folder
    raise InputError(
        f"no tokenizer in {looked}, and a single-file model has none: put vocab.json and merges.txt of "
        "openai/clip-vit-large-patch14 into a folder and pass that as tokenizer"
    )


def _vocabularies(folder: Path, search: bool) -> Iterator[tuple[Path, tuple[str, str]]]:
    """Yield the places to look in, one after the other, with the two tokenizers' folders there."""
    yield folder, TOKENIZERS
    yield folder, ("", "")
    for offline in (True, False) if search else ():
        for repository, parts in VOCABULARIES.items():
            patterns = [str(Path(part, name)) for part in parts for name in ("*.json", "merges.txt")]
            place = fetch_files(repository, patterns, offline=offline)
            if place is not None:
                yield place, parts


def _read_tokenizer(folder: Path, padding: str) -> CLIPTokenizer:
    # CLIP's own folder serves both tokenizers, and a bare vocabulary says nothing of its padding
    own = folder.name in TOKENIZERS and (folder / "tokenizer_config.json").is_file()
    options = {} if own else {"pad_token": padding, "model_max_length": 77}
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{folder}: tokenizer not readable: {first_line(error)}") from error
