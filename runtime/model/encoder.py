"""The half of SDXL's UNet that goes down, which a ControlNet has too: latents in, skip tensors out.

Parameters carry diffusers' names. What does not change over the denoising steps is computed once and handed in: the
time projections of all steps (`embed_time`), the keys and values of every cross-attention (`project_text`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.model.blocks import (
    DownBlock,
    Injection,
    KeyValue,
    MidBlock,
    Resnet,
    Transformer,
    TransformerBlock,
    UpBlock,
)
from runtime.model.config import EncoderConfig

E = TypeVar("E", bound="Encoder")


class Encoder(nn.Module):
    """Down blocks and mid block, and what they take."""

    def __init__(self, config: EncoderConfig, mid_attends: bool = True):
        """mid_attends: whether the mid block has a transformer and a second resnet."""
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        embed = config.flip_sin_to_cos, config.freq_shift
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_proj = Timesteps(channels[0], *embed)
        self.time_embedding = TimestepEmbedding(channels[0], config.time_channels)
        self.add_time_proj = Timesteps(config.addition_time_embed_dim, *embed)
        self.add_embedding = TimestepEmbedding(
            config.projection_class_embeddings_input_dim, config.time_channels
        )
        self.down_blocks = nn.ModuleList(_down_blocks(config))
        self.mid_block = _mid_block(config, mid_attends)

    @classmethod
    def adopt(cls: type[E], theirs: nn.Module, *arguments) -> E:
        """Return one over the parameter tensors of diffusers' model, nothing copied; frozen and in eval mode.

        The convolutions' weights are laid out channels_last first, in `theirs` itself: its values stay, and a kernel
        does not have to rearrange them at every call. arguments: of the class. Raises InputError where the weights
        are not plain ones of these shapes.
        """
        with torch.device("meta"):
            model = cls(*arguments).requires_grad_(False)
        _check_plain(theirs, model.state_dict())
        theirs.to(memory_format=torch.channels_last)
        model.load_state_dict(theirs.state_dict(), assign=True, strict=True)
        return model.eval()

    def resnets(self) -> list[Resnet]:
        """Return the resnets in the order of the forward pass."""
        return [resnet for block in self._blocks() for resnet in block.resnets]

    def transformer_blocks(self) -> list[TransformerBlock]:
        """Return the transformer blocks in the order of the forward pass."""
        transformers = [transformer for block in self._blocks() for transformer in block.attentions]
        return [block for transformer in transformers for block in transformer.transformer_blocks]

    def text_levels(self) -> list[int]:
        """Return how often the latents are halved where each transformer block is, in the order of the forward pass."""
        deepest = len(self.down_blocks) - 1
        levels = [*range(deepest + 1), deepest, *range(deepest, -1, -1)]
        return [
            level
            for level, block in zip(levels, self._blocks(), strict=False)
            for transformer in block.attentions
            for _ in transformer.transformer_blocks
        ]

    def _blocks(self) -> list[DownBlock | MidBlock | UpBlock]:
        return [*self.down_blocks, self.mid_block]

    def embed_time(self, timesteps: Tensor, pooled: Tensor, time_ids: Tensor) -> list[Tensor]:
        """Return each resnet's time projection at every step: (T, B, C), in the order of the forward pass.

        timesteps: (T,), may be fractional, or (T, B) where every row of the batch is at its own, as in training.
        pooled: the text's pooled embedding, (B, P).
        time_ids: (B, 6), original size, crop corner and target size, each (height, width) in pixels.
        """
        dtype = self.conv_in.weight.dtype
        steps = self.time_embedding(self.time_proj(timesteps.flatten()).to(dtype))
        steps = steps.unflatten(0, (timesteps.shape[0], -1))  # (T, 1 or B, C)
        embedding = F.silu(steps + self.embed_image(pooled, time_ids)[None])
        return [resnet.project_time(embedding) for resnet in self.resnets()]

    def embed_image(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """Return what is the same at every step of `embed_time`, (B, C)."""
        dtype = self.conv_in.weight.dtype
        ids = self.add_time_proj(time_ids.flatten()).unflatten(0, (-1, time_ids.shape[1])).flatten(1)
        return self.add_embedding(torch.cat([pooled.to(dtype), ids.to(dtype)], dim=1))

    def project_text(self, text: Tensor) -> list[KeyValue]:
        """Return key and value of each cross-attention, (B, heads, S, C / heads), in the order of the forward pass.

        text: the text encoders' hidden states, (B, S, D), or of several texts a row, (B, P, S, D).
        """
        found = [block.attn2.project(text.flatten(0, -3)) for block in self.transformer_blocks()]
        return [tuple(x.unflatten(0, text.shape[:-2]) for x in pair) for pair in found]

    def go_down(
        self, x: Tensor, time: Iterator[Tensor], text: Iterator, control: Sequence[Injection | None]
    ) -> list[Tensor]:
        """Return the skip tensors, x itself the first, on what conv_in gave; control: of each down block."""
        skips = [x]
        for block, level in zip(self.down_blocks, control, strict=True):
            skips += block(skips[-1], time, text, level)
        return skips


def make_resnet(config: EncoderConfig, in_channels: int, out_channels: int) -> Resnet:
    return Resnet(in_channels, out_channels, config.time_channels, config.norm_num_groups, config.norm_eps)


def make_transformers(config: EncoderConfig, block_type: str, level: int, count: int) -> list[Transformer]:
    if not block_type.startswith("CrossAttn"):
        return []
    channels, heads = config.block_out_channels[level], config.attention_head_dim[level]
    depth, groups = config.transformer_layers_per_block[level], config.norm_num_groups
    shape = channels, config.cross_attention_dim, heads, depth, groups, config.use_linear_projection
    return [Transformer(*shape) for _ in range(count)]


def _down_blocks(config: EncoderConfig) -> list[DownBlock]:
    blocks, incoming, last = [], config.block_out_channels[0], len(config.block_out_channels) - 1
    for level, channels in enumerate(config.block_out_channels):
        count = config.layers_per_block[level]
        resnets = [make_resnet(config, channels if i else incoming, channels) for i in range(count)]
        transformers = make_transformers(config, config.down_block_types[level], level, count)
        blocks.append(DownBlock(resnets, transformers, None if level == last else channels))
        incoming = channels
    return blocks


def _mid_block(config: EncoderConfig, attends: bool) -> MidBlock:
    channels, last = config.block_out_channels[-1], len(config.block_out_channels) - 1
    resnets = [make_resnet(config, channels, channels) for _ in range(1 + attends)]
    return MidBlock(resnets, make_transformers(config, "CrossAttnMid", last, 1) if attends else [])


def _check_plain(theirs: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Raise InputError unless a model's weights are those expected, by name and shape, in numbers to compute with."""
    found = theirs.state_dict()
    wrong = [name for name in expected if not _is_plain(found.get(name), expected[name])]
    wrong += [name for name in found if name not in expected]
    if wrong:
        raise InputError(
            f"{type(theirs).__name__}: {len(wrong)} weights are not as its config says, first {wrong[0]} (quantized or "
            "parametrized?); expected plain ones in float32, bfloat16 or float16"
        )


def _is_plain(tensor: Tensor | None, expected: Tensor) -> bool:
    fits = tensor is not None and tensor.shape == expected.shape
    return fits and tensor.is_floating_point() and tensor.element_size() > 1
