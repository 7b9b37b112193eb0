"""What is trained: a T2I-Adapter, or a ControlNet, in diffusers' classes; chosen by `TrainConfig.control`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from diffusers import ControlNetModel, T2IAdapter
from torch import Tensor, nn

from runtime.control.adapters import check_adapter
from runtime.errors import InputError
from runtime.loading.adapter import load_adapter
from runtime.loading.controlnet import check_controlnet, load_controlnet
from runtime.loading.load import Model
from runtime.loading.quiet import quiet
from runtime.model.controlnet import ControlNet
from runtime.model.unet import UNet
from runtime.model.vae import vae_factor
from runtime.pipeline import LocalControlPipeline
from training.config import TrainConfig

# Options that a new ControlNet has from its UNet
FROM_UNET = (
    "in_channels",
    "down_block_types",
    "block_out_channels",
    "transformer_layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
    "norm_eps",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "flip_sin_to_cos",
    "freq_shift",
)


def trains_controlnet(config: TrainConfig) -> bool:
    """Return whether it is a ControlNet that the run trains."""
    return config.control == "controlnet"


def new_control(config: TrainConfig, model: Model) -> nn.Module:
    """Return a new T2I-Adapter or ControlNet for the model, or the one to go on from, in float32 on the CPU.

    Raises InputError where that one does not load, or does not fit the model.
    """
    unet, name = model.unet, config.adapter
    if name == "new":
        if trains_controlnet(config):
            return new_controlnet(unet)
        return new_adapter(unet.config.control_channels, config.condition_channels, config.adapter_blocks)
    if not trains_controlnet(config):
        adapter = load_adapter(name, device="cpu", dtype=torch.float32)
        check_adapter(name, {name: adapter}, unet.config.control_channels)
        return adapter
    ours = load_controlnet(name, device="cpu", dtype=torch.float32, unions=False)
    check_controlnet(name, ours, unet.config, vae_factor(model.vae))
    return _as_diffusers(ours)


def new_adapter(channels: tuple[int, ...], condition_channels: int, num_res_blocks: int = 2) -> T2IAdapter:
    """Return a T2I-Adapter for SDXL with random weights, float32; channels: of the UNet's control at each level."""
    return T2IAdapter(
        in_channels=condition_channels,
        channels=list(channels),
        num_res_blocks=num_res_blocks,
        downscale_factor=16,
        adapter_type="full_adapter_xl",
    )


def new_controlnet(unet: UNet) -> ControlNetModel:
    """Return a ControlNet that starts as a copy of the UNet's encoder and adds nothing yet, float32 on the CPU.

    Raises InputError where the UNet has other numbers of layers at its levels, which ControlNets do not.
    """
    layers = set(unet.config.layers_per_block)
    if len(layers) != 1:
        raise InputError(
            f"model: its UNet has {sorted(layers)} layers a block; a ControlNet has one number of them"
        )
    options = {key: getattr(unet.config, key) for key in FROM_UNET}
    net = ControlNetModel(**options, layers_per_block=layers.pop(), addition_embed_type="text_time")
    weights = unet.state_dict()
    encoder = {key: weights[key].float().cpu() for key in net.state_dict() if key in weights}
    missing, _ = net.load_state_dict(encoder, strict=False)
    if stray := [key for key in missing if not key.startswith("controlnet_")]:
        raise InputError(f"model: its UNet has no {stray[0]}; expected SDXL's")
    return net


def condition_channels(control: nn.Module) -> int:
    """Return the channels of the condition that it reads."""
    config = control.config
    return config.conditioning_channels if isinstance(control, ControlNetModel) else config.in_channels


def with_weights(config: Mapping, weights: Mapping[str, Tensor], controlnet: bool) -> nn.Module:
    """Return a T2I-Adapter or a ControlNet of diffusers' config with these weights."""
    with torch.device("meta"):
        control = (ControlNetModel if controlnet else T2IAdapter)(**config)
    control.load_state_dict(weights, assign=True)
    return control


def pipeline_with(model: Model, name: str, control: nn.Module, backend: str) -> LocalControlPipeline:
    """Return a pipeline that draws with it, in eval mode, on the model's device and in its dtype."""
    where = model.unet.conv_in.weight
    with quiet():
        control = control.to(where.device, where.dtype).eval()
    if isinstance(control, ControlNetModel):
        nets = {name: ControlNet.from_diffusers(control)}
        return LocalControlPipeline(model, {}, backend, controlnets=nets)
    return LocalControlPipeline(model, {name: control}, backend)


def _as_diffusers(net: ControlNet) -> ControlNetModel:
    options = {key: value for key, value in asdict(net.config).items() if not key.startswith("num_")}
    options["layers_per_block"] = options["layers_per_block"][0]
    return with_weights(options | {"addition_embed_type": "text_time"}, net.state_dict(), True)
