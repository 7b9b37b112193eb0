"""Write a diffusers SDXL pipeline into the original single-file layout: what fine-tuned models are published as.

The names are those of Stability AI's generative-models (sgm): openaimodel.UNetModel, FrozenCLIPEmbedder (transformers'
names), FrozenOpenCLIPEmbedder2 (open_clip's), AutoencoderKL. Only names change, but for two: open_clip keeps query, key
and value in one matrix and its text projection transposed; the VAE's attention is made of 1x1 convolutions.
"""

import re
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_NAMES = {
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def to_single_file(pipe: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """All the tensors of a pipeline under their names in the original layout, ready for safetensors' save_file."""
    parts = {
        "model.diffusion_model.": unet_tensors(pipe.unet),
        "conditioner.embedders.0.transformer.": clip_tensors(pipe.text_encoder),
        "conditioner.embedders.1.model.": open_clip_tensors(pipe.text_encoder_2),
        "first_stage_model.": vae_tensors(pipe.vae),
    }
    return {
        prefix + name: value.contiguous() for prefix, part in parts.items() for name, value in part.items()
    }


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    # a down block's resnets and its downsampler; an up block's resnets
    shape = unet.config.layers_per_block + 1, unet.config.up_block_types
    return {_unet_name(name, *shape): value for name, value in unet.state_dict().items()}


def _unet_name(name: str, per_block: int, up_block_types: Sequence[str]) -> str:
    if match := re.match(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(?:conv\.)?(.*)", name
    ):
        side, block, kind, layer, rest = match.groups()
        index = int(block) * per_block + int(layer)
        if kind == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * per_block}.0.op.{rest}"
        if kind == "upsamplers":
            after_attention = up_block_types[int(block)].startswith("CrossAttn")
            return f"output_blocks.{(int(block) + 1) * per_block - 1}.{1 + after_attention}.conv.{rest}"
        place = f"input_blocks.{index + 1}" if side == "down" else f"output_blocks.{index}"
        return f"{place}.0.{replace(rest, RESNET_NAMES)}" if kind == "resnets" else f"{place}.1.{rest}"
    name = replace(name, UNET_NAMES)
    return replace(name, RESNET_NAMES) if name.startswith(("middle_block.0", "middle_block.2")) else name


def controlnet_tensors(net: ControlNetModel) -> dict[str, Tensor]:
    """All the tensors of a ControlNet under their names in the original layout (control_model.*)."""
    hint = {"conv_in": 0, "conv_out": 14} | {f"blocks.{i}": 2 * i + 2 for i in range(6)}
    per_block = net.config.layers_per_block + 1

    def rename(name: str) -> str:
        if match := re.match(r"controlnet_cond_embedding\.(.*)\.(weight|bias)", name):
            return f"input_hint_block.{hint[match[1]]}.{match[2]}"
        name = re.sub(r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", name)
        name = re.sub(r"^controlnet_mid_block", "middle_block_out.0", name)
        return _unet_name(name, per_block, ())

    return {f"control_model.{rename(name)}": value for name, value in net.state_dict().items()}


def vae_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    tensors = {}
    for name, value in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        name = replace(name, VAE_NAMES)
        linear = ".attn_1." in name and value.ndim == 2
        tensors[name] = value[:, :, None, None] if linear else value
    return tensors


def clip_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    tensors = prefixed(text_encoder)
    positions = text_encoder.config.max_position_embeddings
    return {**tensors, "text_model.embeddings.position_ids": torch.arange(positions)[None]}


def open_clip_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    source = prefixed(text_encoder)
    tensors = {
        "positional_embedding": source.pop("text_model.embeddings.position_embedding.weight"),
        "text_projection": source.pop("text_projection.weight").T,
        "logit_scale": torch.tensor(4.6),
    }
    for name, value in source.items():
        if match := re.search(r"\.[qkv]_proj\.(weight|bias)$", name):
            if ".q_proj." in name:
                parts = [source[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
                stem = replace(name[: match.start()], OPEN_CLIP_NAMES)
                tensors[f"{stem}.in_proj_{match[1]}"] = torch.cat(parts)
        else:
            tensors[replace(name, OPEN_CLIP_NAMES)] = value
    return tensors


def prefixed(text_encoder: nn.Module) -> dict[str, Tensor]:
    """The state dict with the text_model. that newer transformers leave out of CLIPTextModel's names."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value
        for name, value in text_encoder.state_dict().items()
    }


def replace(name: str, names: dict[str, str]) -> str:
    """Replace whole dotted parts of a tensor's name."""
    for old, new in names.items():
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
    return name
