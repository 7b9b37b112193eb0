"""Loading an SDXL model: the embedded one, a diffusers folder, a single file, a hub id, a diffusers pipeline.

There is one path: everything loads into diffusers' StableDiffusionXLPipeline, LoRAs are fused there, and
`from_diffusers` takes the parts out of it, the UNet's weights shared with our own UNet.
"""

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from runtime.arguments import truth
from runtime.errors import InputError
from runtime.loading.altered import unaltered
from runtime.loading.folder import EXPECTED, MODELS, TOKENIZERS, check_configs, load_component, load_folder
from runtime.loading.hub import cache_folder, fetch_files, fetch_pipeline, is_hub_id
from runtime.loading.lora import LoraSource, find_lora, fuse_lora
from runtime.loading.quiet import quiet
from runtime.loading.single_file import SDXL_CONFIGS, load_single_file, load_vae_file
from runtime.loading.weights import check_finite_weights
from runtime.loading.zero_snr import spelled_out
from runtime.machine.arithmetic import DTYPES
from runtime.machine.files import expand, reads
from runtime.model.latent_rgb import LatentRGB, known_projection
from runtime.model.unet import UNet

EMBEDDED = Path(__file__).parents[1] / "embedded"
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass
class Model:
    """The parts of an SDXL model; `scheduler` has the noise schedule and prediction type it was trained for."""

    name: str
    unet: UNet
    vae: AutoencoderKL
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    scheduler: SchedulerMixin
    sample_size: int  # of the latents the model was trained on
    force_zeros_for_empty_prompt: bool
    latent_rgb: LatentRGB | None = None  # of previews; None where it is not known yet


@reads()
def load_model(
    source: str | Path = "embedded",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
    loras: Iterable[LoraSource] = (),
    allow_pickle: bool = False,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    vae_dtype: torch.dtype | None = None,
) -> Model:
    """Load an SDXL text-to-image model.

    source: "embedded", a diffusers folder, a .safetensors file in the original SDXL layout, or a hub id
        "organisation/name" (Hugging Face's cache first, then the network).
    dtype: float32, bfloat16 or float16, for all but a VAE that overflows in float16 (its config says
        force_upcast, as SDXL's original does): that one stays float32. The VAE works in its own dtype.
    vae: another VAE: a diffusers folder, a .safetensors file in diffusers' or the original layout, a hub id.
    loras: files, or (file, weight), fused into the weights.
    allow_pickle: also read .bin and .ckpt files, tensors only (weights_only=True).
    tokenizer, config: for a single file: a folder with CLIP's vocabulary; one with diffusers' configs.
    prediction_type: "epsilon" or "v_prediction", what the model predicts; by default what its files say.
    rescale_betas_zero_snr: whether its noise schedule ends at zero SNR; by default what its files say.
    vae_dtype: the VAE's own, by default as said of dtype.

    Raises InputError, naming the file and what was expected, before anything large is read where it can.
    """
    if dtype not in DTYPES.values():
        raise InputError(f"dtype {dtype}: expected float32, bfloat16 or float16")
    allow_pickle = truth(allow_pickle, "allow_pickle")
    if rescale_betas_zero_snr is not None:
        rescale_betas_zero_snr = truth(rescale_betas_zero_snr, "rescale_betas_zero_snr")
    if isinstance(loras, (str, os.PathLike)) or not isinstance(loras, Iterable):
        raise InputError(f"loras {str(loras)!r}: expected a list of files, or of (file, weight)")
    loras = [find_lora(lora, allow_pickle) for lora in loras]
    path = EMBEDDED if str(source) == "embedded" else _find(source, dtype, allow_pickle)
    config = expand(config, "config") if config else None
    tokenizer = expand(tokenizer, "tokenizer") if tokenizer else None
    for option, folder in {"tokenizer": tokenizer, "config": config}.items():
        if folder is not None and not path.is_file():
            own = f"{source} is a folder, which has its own"
            raise InputError(f"{option} {folder}: for a single file, and {own}; leave it out")
    with quiet():
        configs = (config or SDXL_CONFIGS) if path.is_file() else path
        new_vae, vae_folder = None, path / "vae"
        if vae is not None:
            new_vae, vae_folder = _load_vae(vae, configs / "vae", allow_pickle)
        if path.is_file():
            pipe = load_single_file(
                path, dtype=dtype, vae=new_vae, allow_pickle=allow_pickle, tokenizer=tokenizer, config=config
            )
        else:
            pipe = load_folder(path, dtype=dtype, vae=new_vae, allow_pickle=allow_pickle)
        if vae_dtype is not None:
            pipe.vae.to(vae_dtype)
        elif not (dtype == torch.float16 and pipe.vae.config.force_upcast):
            pipe.vae.to(dtype)
        set_schedule(pipe, prediction_type, rescale_betas_zero_snr)
        pipe.to(device)
        for lora in loras:
            fuse_lora(pipe, lora)
    parts = {part: getattr(pipe, part).requires_grad_(False) for part in MODELS}
    check_finite_weights(parts, str(source))
    model = from_diffusers(pipe, name=str(source))
    model.latent_rgb = known_projection(model.vae, vae_folder)
    return model


def set_schedule(pipe: DiffusionPipeline, prediction_type: str | None, zero_snr: bool | None) -> None:
    """Have a pipeline's scheduler follow what the user says of the model. Raises InputError for an unknown type."""
    options: dict[str, object] = {}
    if prediction_type is not None:
        if prediction_type not in PREDICTION_TYPES:
            raise InputError(f"prediction_type {prediction_type!r}: expected {' or '.join(PREDICTION_TYPES)}")
        options["prediction_type"] = prediction_type
    if zero_snr is not None:
        options["rescale_betas_zero_snr"] = bool(zero_snr)
        options |= {"timestep_spacing": "trailing"} if zero_snr else {}
    if options:
        kind = type(pipe.scheduler)
        pipe.scheduler = kind.from_config(spelled_out(kind, pipe.scheduler.config | options))


def _is_offloaded(model: torch.nn.Module) -> bool:
    """Return whether accelerate keeps weights of a model elsewhere, and brings them for each layer's call alone."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return hooked and any(parameter.is_meta for parameter in model.parameters())


def from_diffusers(pipe: DiffusionPipeline, name: str | None = None) -> Model:
    """Take the parts out of any diffusers SDXL pipeline. The weights are shared with it, not copied.

    Only a float16 VAE that overflows in float16 (force_upcast) is copied, in float32. Raises InputError where
    the pipeline is not an SDXL text-to-image one, has LoRA layers that are not fused, or a UNet that does more than its
    weights say.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(f"from_diffusers: a {type(pipe).__name__}; expected a diffusers SDXL pipeline")
    name = name or getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__
    absent = [part for part in (*MODELS, *TOKENIZERS, "scheduler") if getattr(pipe, part, None) is None]
    if absent:
        raise InputError(f"{type(pipe).__name__} {name}: it has no {', '.join(absent)}; {EXPECTED}")
    for part in MODELS:
        if _is_offloaded(getattr(pipe, part)):
            raise InputError(
                f"{name}: the weights of its {part} are offloaded; expected a pipeline without "
                "enable_sequential_cpu_offload(), or from_pretrained(..., offload='group')"
            )
    text_encoders = (pipe.text_encoder, pipe.text_encoder_2)
    check_configs(
        name, pipe.unet.config, pipe.vae.config, *(encoder.config.to_dict() for encoder in text_encoders)
    )
    for module in (pipe.unet, *text_encoders):
        if getattr(module, "peft_config", None):
            raise InputError(
                f"{name}: its {type(module).__name__} has LoRA layers; expected them fused: "
                "pipe.fuse_lora(), then pipe.unload_lora_weights()"
            )
    _check_tokenizers(name, (pipe.tokenizer, pipe.tokenizer_2), text_encoders)
    theirs = unaltered(pipe.unet, name)
    try:
        unet = UNet.from_diffusers(theirs)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    vae = pipe.vae
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        vae = copy.deepcopy(vae).float()
    return Model(
        name=name,
        unet=unet,
        vae=vae,
        tokenizers=(pipe.tokenizer, pipe.tokenizer_2),
        text_encoders=text_encoders,
        scheduler=pipe.scheduler,
        sample_size=_sample_size(pipe.unet.config.sample_size, name),
        force_zeros_for_empty_prompt=bool(pipe.config.get("force_zeros_for_empty_prompt", True)),
        latent_rgb=known_projection(vae),
    )


def _check_tokenizers(name: str, tokenizers: tuple, text_encoders: tuple) -> None:
    """Raise InputError unless each tokenizer's tokens are its encoder's. One that says no length gets the encoder's."""
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        if len(tokenizer) > encoder.config.vocab_size:
            raise InputError(
                f"{name}: the tokenizer has {len(tokenizer)} tokens, its text encoder {encoder.config.vocab_size}"
            )
        length = tokenizer.model_max_length
        if type(length) not in (int, float) or not length >= 3:  # the start, a token and the end
            raise InputError(f"{name}: the tokenizer's model_max_length is {length!r}; expected 3 or more")
        tokenizer.model_max_length = int(min(length, encoder.config.max_position_embeddings))
    first, second = (tokenizer.model_max_length for tokenizer in tokenizers)
    if first != second:
        raise InputError(
            f"{name}: the tokenizers' model_max_length is {first} and {second}; expected the same"
        )


def _sample_size(configured: int | list[int] | None, name: str) -> int:
    """Return a UNet config's sample_size: a number, rarely a pair; SDXL's own where it says nothing."""
    sizes = configured if isinstance(configured, (list, tuple)) else [configured or 128]
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(f"{name}: the UNet's sample_size is {configured!r}; expected a whole number, or two")
    return max(sizes)


def _find(source: str | Path, dtype: torch.dtype, allow_pickle: bool) -> Path:
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise InputError(
            f"model {source!r}: expected embedded, a diffusers folder, a .safetensors file or a hub id"
        )
    if (path := expand(source, "model")).exists():
        return path
    if is_hub_id(str(source)):
        return fetch_pipeline(str(source), dtype=dtype, allow_pickle=allow_pickle)
    raise InputError(
        f"model {source}: no such file or folder; expected embedded, a diffusers folder, a .safetensors file "
        "or a hub id"
    )


def _load_vae(source: str | Path, config: Path, allow_pickle: bool) -> tuple[AutoencoderKL, Path | None]:
    """Load a VAE, in float32; return its folder too. config: the folder of the config of a single file's."""
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"vae {source!r}: expected a folder, a .safetensors file or a hub id")
    path = expand(source, "vae")
    if not path.exists() and is_hub_id(str(source)):
        patterns = ["config.json", "diffusion_pytorch_model*.safetensors"]
        found = fetch_files(str(source), patterns, offline=True) or fetch_files(
            str(source), patterns, offline=False
        )
        path = found or cache_folder(str(source))
    if path.is_file():
        return load_vae_file(path, config, allow_pickle), None
    if not path.is_dir():
        raise InputError(f"vae {source}: no such file or folder (looked in {path})")
    folder = path / "vae" if (path / "vae").is_dir() else path
    return load_component(AutoencoderKL, folder, torch.float32, allow_pickle), folder
