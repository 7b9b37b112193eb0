"""Every tensor of a single file is accounted for: taken by a layer, known to be of no use here, or told of by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from runtime.errors import InputError
from runtime.loading.lora_names import original_names
from runtime.loading.scaled import FORMAT, LEFT, MARKER, SCALES, TEXT, UNET, check_plain

TEXT_2, VAE = "conditioner.embedders.1.model.", "first_stage_model."
KINDS = (".weight", ".bias", *SCALES, *LEFT, FORMAT)
# What checkpoints carry beside a model's parts: the noise schedule's numbers, markers of it, averages, what trained it.
UNUSED = re.compile(
    r"(model_ema\.|first_stage_model\.(loss|model_ema)\.|denoiser\.|(sqrt_)?(one_minus_|recip_|recipm1_)?alphas_|betas$"
    r"|log_one_minus_|posterior_|v_pred$|ztsnr$|lvlb_weights$|logvar$|(.*\.)?" + MARKER + r"$)"
)
# Of CLIP's encoders: positions, which are 0, 1, 2 ..., and what compares words with pictures.
UNUSED_OF_TEXT = re.compile(
    r"(text_model\.embeddings\.position_ids|logit_scale|attn_mask|text_projection(\.weight)?)$"
)
VAES = (VAE, "vae.")
# Of a VAE: what trained it, averages, and diffusers' older names of its attention, which diffusers itself renames.
UNUSED_OF_VAE = re.compile(r"(loss\.|model_ema\.|.*attentions\.0\.(query|key|value|proj_attn)\.)")
OPEN_CLIP = re.compile(
    r"(positional_embedding|token_embedding|ln_final"
    r"|transformer\.resblocks\.(\d+)\.(ln_1|ln_2|mlp\.c_fc|mlp\.c_proj|attn\.out_proj|attn\.in_proj))(_weight|_bias)?$"
)


def check_names(path: Path, pipe: StableDiffusionXLPipeline, names: Collection[str]) -> None:
    """Raise InputError for a tensor of the UNet or of a text encoder that no layer has taken.

    Warns, in one line, of tensors that are of no part of the model.
    """
    unet = {name for name, _ in original_names(pipe.unet)}
    text = {_plain(name) for name, _ in pipe.text_encoder.named_modules()}
    layers = pipe.text_encoder_2.config.num_hidden_layers
    strange = []
    for name in names:
        if UNUSED.match(name):
            continue
        if name.startswith(UNET):
            _expect(_layer(name, UNET) in unet, path, name, "UNet")
        elif name.startswith(TEXT):
            own = name.removeprefix(TEXT)
            _expect(
                bool(UNUSED_OF_TEXT.match(own)) or _plain(_layer(own)) in text,
                path,
                name,
                "first text encoder",
            )
        elif name.startswith(TEXT_2):
            own = name.removeprefix(TEXT_2)
            _expect(
                bool(UNUSED_OF_TEXT.match(own)) or _in_open_clip(own, layers),
                path,
                name,
                "second text encoder",
            )
        elif not name.startswith(VAE):
            strange.append(name)
    if strange:
        warnings.warn(
            f"{path}: {len(strange)} tensors of no part of SDXL are not read, first {strange[0]}",
            stacklevel=2,
        )


def check_vae_names(path: Path, vae: AutoencoderKL, names: Collection[str]) -> None:
    """Warn, in one line, of a VAE's tensors that no layer has taken. Raises InputError where there are scales."""
    prefix = next((prefix for prefix in VAES if any(name.startswith(prefix) for name in names)), "")
    own = [
        name
        for name in names
        if name.startswith(prefix) and not UNUSED_OF_VAE.match(name.removeprefix(prefix))
    ]
    check_plain(path, own)
    layers = vae.state_dict().keys()
    numbers = {name: torch.tensor(i) for i, name in enumerate(own)}  # that come out under diffusers' names
    made = convert_ldm_vae_checkpoint(dict(numbers), vae.config)
    taken = {own[value] for name, value in made.items() if name in layers}
    left = [name for name in own if name not in taken and name.removeprefix(prefix) not in layers]
    if left:
        warnings.warn(
            f"{path}: {len(left)} tensors of no part of the VAE are not read, first {left[0]}", stacklevel=3
        )


def _expect(known: bool, path: Path, name: str, part: str) -> None:
    if not known:
        raise InputError(f"{path}: {name}: a tensor that SDXL's {part} does not have")


def _layer(name: str, prefix: str = "") -> str:
    kind = next((kind for kind in KINDS if name.endswith(kind)), "")
    return name.removeprefix(prefix).removesuffix(kind)


def _plain(name: str) -> str:
    """Return a layer's name without the prefix that newer versions of transformers leave out."""
    return name.removeprefix("text_model.")


def _in_open_clip(name: str, layers: int) -> bool:
    found = OPEN_CLIP.match(_layer(name))
    return found is not None and (found[2] is None or int(found[2]) < layers)
