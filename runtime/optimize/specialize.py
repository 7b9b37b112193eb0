"""A model made fast where it runs: its layers exchanged for those that suit the device, its values kept."""

from __future__ import annotations

import torch

from runtime.loading.load import Model
from runtime.optimize.fp8 import quantize as quantized
from runtime.optimize.fused import fuse_unet, fuse_vae, fuses_here
from runtime.optimize.fused_qkv import fuse_qkv
from runtime.optimize.packed import pack_weights, packs_here


def specialize(
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    quantize: str | None = None,
) -> None:
    """Change the UNet and the VAE in place.

    backend: of the kernels. quantize: one of `fp8.QUANTIZATIONS` (lossy).
    """
    fuse_qkv(model.unet)
    fuses = fuses_here(backend, device)
    if quantize is not None:
        quantized(model.unet, quantize)
    elif packs_here(dtype, device) and not fuses:
        pack_weights(model.unet)
    if fuses:
        fuse_unet(model.unet)
        fuse_vae(model.vae)
    model.vae.to(memory_format=torch.channels_last)  # on a CPU too: SDXL's decodes a fifth faster
