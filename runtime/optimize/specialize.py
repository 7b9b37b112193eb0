"""A model made fast where it runs: its layers exchanged for those that suit the device, its values kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from runtime.loading.load import Model
from runtime.model.controlnet import ControlNet
from runtime.optimize.fp8 import quantize as quantized
from runtime.optimize.fused import fuse_encoder, fuse_unet, fuse_vae, fuses_here
from runtime.optimize.fused_qkv import fuse_qkv
from runtime.optimize.packed import pack_weights, packs_here


def specialize(
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    quantize: str | None = None,
    controlnets: Iterable[ControlNet] = (),
) -> None:
    """Change the UNet, ControlNets and the VAE in place.

    backend: of the kernels. quantize: one of `fp8.QUANTIZATIONS` (lossy), of the UNet alone.
    """
    fuses, nets = fuses_here(backend, device), distinct(controlnets)
    for encoder in (model.unet, *nets):
        fuse_qkv(encoder)
    if quantize is not None:
        quantized(model.unet, quantize)
    if packs_here(dtype, device) and not fuses:
        for encoder in (*nets, *([model.unet] if quantize is None else [])):
            pack_weights(encoder)
    if fuses:
        fuse_unet(model.unet)
        for net in nets:
            fuse_encoder(net)
        fuse_vae(model.vae)
    model.vae.to(memory_format=torch.channels_last)  # on a CPU too: SDXL's decodes a fifth faster


def distinct(controlnets: Iterable[ControlNet]) -> list[ControlNet]:
    """Return those that share no layers: names of a union's controls are names of one net."""
    return list({id(net.down_blocks): net for net in controlnets}.values())
