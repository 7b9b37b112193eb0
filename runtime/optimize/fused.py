"""A UNet and a VAE for a GPU: normalisations and gates as `kernels.ops`, one call where PyTorch takes two or three.

PyTorch's own group norm answers in NCHW whatever it was given (torch 2.13, CUDA), and the next convolution turns that
around again; `kernels.ops.group_norm_silu` keeps NHWC. Parameters, their names and what is computed stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention as VaeAttention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from kernels import ops
from kernels.reference import Float8Rows
from runtime.model.blocks import (
    GEGLU,
    FeedForward,
    KeyValue,
    Resnet,
    SharedText,
    Transformer,
    TransformerBlock,
)
from runtime.model.encoder import Encoder
from runtime.model.unet import UNet
from runtime.optimize.exchange import exchange
from runtime.optimize.fp8 import Fp8Linear
from runtime.optimize.fused_resnet import fuse_resnet


class FusedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm of (B, C, H, W), memory format kept."""

    silu = False

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """offset: (B or 1, C), added to every pixel first."""
        given = x, self.weight, self.bias, self.num_groups, self.eps, self.silu
        return ops.group_norm_silu(*given, offset=offset)


class FusedGroupNormSiLU(FusedGroupNorm):
    """The same, and SiLU."""

    silu = True


class FusedGEGLU(GEGLU):
    """The gate in one pass over the linear layer's result."""

    float8 = False  # what it returns: for a layer that multiplies in that

    def forward(self, x: Tensor | Float8Rows) -> Tensor | Float8Rows:
        return ops.geglu(self.proj(x), float8=self.float8)


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm of a sum, made on the way. Called as a layer: hooks that bring its weights see the call."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, float8: bool = False
    ) -> tuple[Tensor, Tensor | Float8Rows]:
        """Return x + residual and its norm."""
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, float8=float8)


class FusedTransformerBlock(TransformerBlock):
    """Each sum of the residual stream normalised as it is made."""

    def forward(
        self, x: Tensor, text: KeyValue | SharedText, last: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the next block's x and `last`, whose sum is this one's result. last: what is to be added to x."""
        x, norm = _normalized(self.norm1, x, last, into=getattr(self.attn1, "to_qkv", None))
        x, norm = _normalized(self.norm2, self.attn1.of_itself(norm), x, into=self.attn2.to_q)
        x, norm = _normalized(self.norm3, self.attn2(norm, *text), x, into=self.ff.net[0].proj)
        return x, self.ff(norm)


class FusedTransformer(Transformer):
    """A block's last sum is made by the next one's first norm."""

    def forward(self, x: Tensor, text: Iterator[KeyValue]) -> Tensor:
        tokens, last = self.tokens_of(x), None
        for block in self.transformer_blocks:
            tokens, last = block(tokens, next(text), last)
        return self.add_tokens(x, tokens if last is None else tokens + last)


def _normalized(
    layer: FusedLayerNorm, x: Tensor, residual: Tensor | None = None, *, into: nn.Module | None
) -> tuple[Tensor, Tensor | Float8Rows]:
    """Return x + residual and its norm, in float8 where `into`, which takes it, multiplies in that."""
    return layer(x, residual, float8=isinstance(into, Fp8Linear))


class ChannelsLastAttention(VaeAttention):
    """The VAE's attention, its result channels_last: diffusers' leaves NCHW, and all that follows would stay so."""

    def forward(self, hidden_states: Tensor, *args, **options) -> Tensor:
        result = super().forward(hidden_states, *args, **options)
        return result.contiguous(memory_format=torch.channels_last) if result.ndim == 4 else result


def fuses_here(backend: str, device: torch.device) -> bool:
    """Return whether `kernels.ops` would run kernels: on a GPU, or in Triton's interpreter where that was asked for."""
    backend = ops.resolve(backend)
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def fuse_encoder(encoder: Encoder) -> Encoder:
    """`encoder`, a UNet or a ControlNet, with the normalisations and gates of its blocks exchanged, in place."""
    for module in list(encoder.modules()):
        if isinstance(module, Resnet):
            exchange(module.norm1, FusedGroupNormSiLU)
            exchange(module.norm2, FusedGroupNormSiLU)
            module.activation = nn.Identity()
            fuse_resnet(module)
        elif isinstance(module, Transformer):
            exchange(module.norm, FusedGroupNorm)
            exchange(module, FusedTransformer)
        elif isinstance(module, FeedForward):
            exchange(module.net[0], FusedGEGLU)
            module.net[0].float8 = isinstance(module.net[2], Fp8Linear)
        elif isinstance(module, TransformerBlock):
            for norm in (module.norm1, module.norm2, module.norm3):
                exchange(norm, FusedLayerNorm)
            exchange(module, FusedTransformerBlock)
    return encoder


def fuse_unet(unet: UNet) -> UNet:
    """`unet` with its normalisations and gates exchanged, in place."""
    fuse_encoder(unet)
    exchange(unet.conv_norm_out, FusedGroupNormSiLU)
    unet.conv_act = nn.Identity()
    return unet


def fuse_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """`vae` with the normalisations of its residual blocks exchanged, in place."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D) and isinstance(module.nonlinearity, nn.SiLU):
            exchange(module.norm1, FusedGroupNormSiLU)
            exchange(module.norm2, FusedGroupNormSiLU)
            module.nonlinearity = nn.Identity()
            fuse_resnet(module)
        elif type(module) is VaeAttention:
            exchange(module, ChannelsLastAttention)
    for part in (vae.encoder, vae.decoder):
        exchange(part.conv_norm_out, FusedGroupNormSiLU)
        part.conv_act = nn.Identity()
    return vae
