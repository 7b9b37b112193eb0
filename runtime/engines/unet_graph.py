"""The UNet as a graph of plain tensors with names: what is exported, compiled and captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from runtime.control.levels import STRIDES
from runtime.engines.ports import (
    KEY,
    LEVEL,
    PREDICTION,
    RESIDUAL,
    SAMPLE,
    SHARES,
    TIME,
    VALUE,
    Axis,
    Port,
    numbered,
)
from runtime.model.blocks import Injection
from runtime.model.config import UNetConfig
from runtime.model.unet import UNet


class Taken(NamedTuple):
    """What a graph takes beside a prompt and the levels of control: regions' words, the residuals of ControlNets."""

    words: bool = False
    residuals: bool = False


class UNetGraph(nn.Module):
    """What a denoising step computes anew. What is known before the first one comes in: `denoiser.constant_inputs`."""

    def __init__(self, unet: UNet, words: bool = False, residuals: bool = False):
        """words: whether regions' words come in beside the prompt, see `blocks.SharedText`. residuals: whether those
        of ControlNets do."""
        super().__init__()
        self.unet, self.words, self.residuals = unet, words, residuals
        self.text_levels = unet.text_levels()
        self.widths = [resnet.time_emb_proj.out_features for resnet in unet.resnets()]
        self.attentions = [block.attn2 for block in unet.transformer_blocks()]
        weight = unet.conv_in.weight
        self.register_buffer("one", torch.ones(1, device=weight.device, dtype=weight.dtype), persistent=False)

    def forward(self, sample: Tensor, time: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """rest: key and value of each cross-attention, the texts' shares, the levels of control, the residuals."""
        count = 2 * len(self.attentions)
        text, rest = list(zip(rest[:count:2], rest[1:count:2], strict=True)), rest[count:]
        if self.words:
            levels = sorted(set(self.text_levels))
            shares, rest = dict(zip(levels, rest, strict=False)), rest[len(levels) :]
            text = [(*pair, shares[level]) for pair, level in zip(text, self.text_levels, strict=True)]
        rest = [Injection([level], None, self.one) for level in rest]
        count = len(self.unet.config.control_channels)
        levels, residuals = rest[:count], rest[count:] if self.residuals else None
        sample = sample.to(self.unet.conv_in.weight.dtype)
        return (self.unet(sample, time.split(self.widths, dim=1), text, levels, residuals).float(),)


def unet_ports(
    graph: UNetGraph, tokens: int | Axis, factor: int, texts: int | Axis = 1
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Return the graph's inputs and outputs. tokens: of a prompt, or the axis of any number; factor: pixels of a
    latent's side. texts: of a picture, the prompt and regions' words, where the graph takes those."""
    config, dtype, rows = graph.unet.config, graph.unet.conv_in.weight.dtype, Axis("rows")
    latents = pixel_axes(factor)
    several = (texts,) if graph.words else ()
    text = [(rows, *several, m.heads, tokens, m.to_q.out_features // m.heads) for m in graph.attentions]
    levels = sorted(set(graph.text_levels)) if graph.words else ()
    inputs = (
        Port(SAMPLE, torch.float32, (rows, config.in_channels, *latents)),
        Port(TIME, dtype, (rows, sum(graph.widths))),
        *(Port(numbered(kind, i), dtype, shape) for i, shape in enumerate(text) for kind in (KEY, VALUE)),
        *(Port(numbered(SHARES, i), dtype, (rows, texts, *pixel_axes(factor * 2**i))) for i in levels),
        *level_ports(config.control_channels, dtype, rows),
        *(residual_ports(config, dtype, factor) if graph.residuals else ()),
    )
    return inputs, (Port(PREDICTION, torch.float32, (rows, config.out_channels, *latents)),)


def level_ports(channels: Sequence[int], dtype: torch.dtype, rows: int | Axis = 1) -> tuple[Port, ...]:
    """Return the gated features, as an adapter gives them for all rows, and the UNet takes them for each."""
    sized = enumerate(zip(channels, STRIDES, strict=True))
    return tuple(Port(numbered(LEVEL, i), dtype, (rows, c, *pixel_axes(stride))) for i, (c, stride) in sized)


def residual_ports(config: UNetConfig, dtype: torch.dtype, factor: int) -> Iterator[Port]:
    """Yield what ControlNets add to each skip tensor and to the mid block."""
    channels = *config.skip_channels, config.block_out_channels[-1]
    levels = *config.skip_levels, len(config.block_out_channels) - 1
    for i, (c, level) in enumerate(zip(channels, levels, strict=True)):
        yield Port(numbered(RESIDUAL, i), dtype, (Axis("rows"), c, *pixel_axes(factor * 2**level)))


def pixel_axes(divisor: int) -> tuple[Axis, Axis]:
    """Height and width, in pixels / divisor."""
    return Axis("height", divisor), Axis("width", divisor)
