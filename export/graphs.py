"""The graphs that are exported: each part of the model as a module of plain tensors, with named inputs and outputs.

The control is two graphs. `adapter` turns a condition, its masks and strengths into four gated feature maps, once per
image and region; `unet` takes their sum at every step, zeros where no control acts. So masks, strengths, the steps at
which a region acts, the adapter and the number of regions change without a rebuild. What the UNet computes once per
image (time projections, keys and values of the text) stays in torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL, T2IAdapter
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from runtime.control.levels import COUNT, STRIDES
from runtime.engines.ports import (
    CONDITION,
    IDS,
    LATENTS,
    MASK,
    MOMENTS,
    PIXELS,
    POOLED,
    STATES,
    STRENGTHS,
    Axis,
    Port,
    numbered,
)
from runtime.engines.unet_graph import UNetGraph, level_ports, pixel_axes, unet_ports
from runtime.loading.load import Model
from runtime.model.vae import vae_factor
from runtime.optimize.packed import unpack_weights
from runtime.text.encode import encode_ids


@dataclass(frozen=True)
class Component:
    """One graph to export. module: frozen, takes the inputs in order, returns a tuple of the outputs."""

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class TextEncoderGraph(nn.Module):
    """Token ids (B, S) -> hidden states (B, S, D) and, of the second encoder, the pooled embedding (B, P)."""

    def __init__(self, encoder: CLIPTextModel | CLIPTextModelWithProjection):
        super().__init__()
        self.encoder = encoder
        self.pools = isinstance(encoder, CLIPTextModelWithProjection)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        states, pooled = encode_ids(self.encoder, ids)
        return (states, pooled) if self.pools else (states,)


class AdapterGraph(nn.Module):
    """One region's gated features: strengths[l] * mask_l * feature_l of each level, in the adapter's dtype."""

    def __init__(self, adapter: T2IAdapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, condition: Tensor, strengths: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
        features = self.adapter(condition.to(self.adapter.dtype))
        gates = [mask * strength for mask, strength in zip(masks, strengths.unbind(), strict=True)]
        return tuple((f.float() * g).to(f.dtype) for f, g in zip(features, gates, strict=True))


class VAEDecoderGraph(nn.Module):
    """Latents, unscaled, (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1], computed in the VAE's dtype."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float(),)


class VAEEncoderGraph(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> mean and log variance of the latents, unscaled, (B, 2C, h, w)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.parameters.float(),)


def make_components(
    model: Model, adapters: Mapping[str, T2IAdapter], names: Sequence[str], words: int = 0
) -> Iterator[Component]:
    """Yield the graphs of the named components; "adapter" stands for every adapter, called adapter_<its name>.

    words: how many regions' words the UNet takes beside the prompt.
    """
    for name in names:
        if name == "adapter":
            for adapter_name, adapter in adapters.items():
                yield adapter_component(f"adapter_{adapter_name}", adapter)
        elif name == "unet":
            yield _unet(name, model, words)
        else:
            yield _MAKERS[name](name, model)


def _text_encoder(name: str, model: Model) -> Component:
    index = ("text_encoder", "text_encoder_2").index(name)
    graph = TextEncoderGraph(model.text_encoders[index])
    ids = Port(IDS, torch.int64, (Axis("items"), model.tokenizers[index].model_max_length))
    config, rows = graph.encoder.config, Axis("items")
    dtype = graph.encoder.dtype
    outputs = [Port(STATES, dtype, (rows, ids.shape[1], config.hidden_size))]
    if graph.pools:
        outputs.append(Port(POOLED, dtype, (rows, config.projection_dim)))
    return Component(name, graph, (ids,), tuple(outputs))


def adapter_component(name: str, adapter: T2IAdapter) -> Component:
    """Return an adapter's graph."""
    condition = Port(CONDITION, torch.float32, (1, adapter.config.in_channels, Axis("height"), Axis("width")))
    masks = [
        Port(numbered(MASK, i), torch.float32, (1, 1, *pixel_axes(stride)))
        for i, stride in enumerate(STRIDES)
    ]
    strengths = Port(STRENGTHS, torch.float32, (COUNT,))
    levels = level_ports(adapter.config.channels, adapter.dtype)
    return Component(name, AdapterGraph(adapter), (condition, strengths, *masks), levels)


def _unet(name: str, model: Model, words: int) -> Component:
    graph = UNetGraph(unpack_weights(model.unet), words > 0)  # an exporter does not look into packed ones
    tokens, factor = model.tokenizers[0].model_max_length, vae_factor(model.vae)
    return Component(name, graph, *unet_ports(graph, tokens, factor, 1 + words))


def _vae_decoder(name: str, model: Model) -> Component:
    latents, pixels = _vae_ports(model, model.vae.config.latent_channels, model.vae.config.out_channels)
    return Component(name, VAEDecoderGraph(model.vae), (latents,), (pixels,))


def _vae_encoder(name: str, model: Model) -> Component:
    moments, pixels = _vae_ports(model, 2 * model.vae.config.latent_channels, model.vae.config.in_channels)
    return Component(name, VAEEncoderGraph(model.vae), (pixels,), (replace(moments, name=MOMENTS),))


def _vae_ports(model: Model, channels: int, colours: int) -> tuple[Port, Port]:
    rows, small = Axis("items"), pixel_axes(vae_factor(model.vae))
    return (
        Port(LATENTS, torch.float32, (rows, channels, *small)),
        Port(PIXELS, torch.float32, (rows, colours, *pixel_axes(1))),
    )


_MAKERS = {
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}
