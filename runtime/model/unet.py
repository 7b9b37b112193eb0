"""SDXL's denoising UNet, written to be read, traced and compiled.

Parameters carry the names of diffusers' UNet2DConditionModel and load strictly from its state dict. What does not
change over the denoising steps is computed once and handed in: the time projections of all steps (`embed_time`),
the keys and values of every cross-attention (`project_text`), the control. Activations are channels_last.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from runtime.model.blocks import (
    DownBlock,
    Injection,
    KeyValue,
    MidBlock,
    Resnet,
    SharedText,
    Transformer,
    TransformerBlock,
    UpBlock,
)
from runtime.model.config import UNetConfig

# In the names of the parameters that run once per image, in `embed_time` and `project_text`, and not in `forward`.
ONCE = ("time_embedding.", "add_embedding.", ".time_emb_proj.", ".attn2.to_k.", ".attn2.to_v.")


class UNet(nn.Module):
    """Drop-in for an SDXL UNet2DConditionModel, with everything that is constant over the steps taken out."""

    def __init__(self, config: UNetConfig):
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
        self.mid_block = _mid_block(config)
        self.up_blocks = nn.ModuleList(_up_blocks(config))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @classmethod
    def from_diffusers(cls, unet: UNet2DConditionModel) -> "UNet":
        """Return a UNet over the same parameter tensors, nothing copied; frozen and in eval mode.

        The convolutions' weights are laid out channels_last first, in `unet` itself: its values stay, and a kernel
        does not have to rearrange them at every call.

        Raises InputError where the config is not SDXL-like, RuntimeError where the state dict does not fit it.
        """
        config = UNetConfig.from_diffusers(unet.config)
        with torch.device("meta"):
            model = cls(config).requires_grad_(False)
        unet.to(memory_format=torch.channels_last)
        model.load_state_dict(unet.state_dict(), assign=True, strict=True)
        return model.eval()

    def once_per_image(self) -> dict[str, Tensor]:
        """Return the parameters of `embed_time` and `project_text`: `forward` uses all others, and none of these."""
        return {name: p for name, p in self.named_parameters() if any(part in name for part in ONCE)}

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
            for level, block in zip(levels, self._blocks(), strict=True)
            for transformer in block.attentions
            for _ in transformer.transformer_blocks
        ]

    def _blocks(self) -> list[DownBlock | MidBlock | UpBlock]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def embed_time(self, timesteps: Tensor, pooled: Tensor, time_ids: Tensor) -> list[Tensor]:
        """Return each resnet's time projection at every step: (T, B, C), in the order of the forward pass.

        timesteps: (T,), may be fractional, or (T, B) where every row of the batch is at its own, as in training.
        pooled: the text's pooled embedding, (B, P).
        time_ids: (B, 6), original size, crop corner and target size, each (height, width) in pixels.
        """
        dtype = self.conv_in.weight.dtype
        steps = self.time_embedding(self.time_proj(timesteps.flatten()).to(dtype))
        steps = steps.unflatten(0, (timesteps.shape[0], -1))  # (T, 1 or B, C)
        ids = self.add_time_proj(time_ids.flatten()).unflatten(0, (-1, time_ids.shape[1])).flatten(1)
        image = self.add_embedding(torch.cat([pooled.to(dtype), ids.to(dtype)], dim=1))
        embedding = F.silu(steps + image[None])
        return [resnet.time_emb_proj(embedding) for resnet in self.resnets()]

    def project_text(self, text: Tensor) -> list[KeyValue]:
        """Return key and value of each cross-attention, (B, heads, S, C / heads), in the order of the forward pass.

        text: the text encoders' hidden states, (B, S, D), or of several texts a row, (B, P, S, D).
        """
        found = [block.attn2.project(text.flatten(0, -3)) for block in self.transformer_blocks()]
        return [tuple(x.unflatten(0, text.shape[:-2]) for x in pair) for pair in found]

    def forward(
        self,
        sample: Tensor,
        time: Sequence[Tensor],
        text: Sequence[KeyValue | SharedText],
        control: Sequence[Injection] | None = None,
    ) -> Tensor:
        """Return the model's prediction, (B, C_out, h, w), channels_last.

        sample: (B, C_in, h, w), any h, w. time: `embed_time` at this step, (B, C) for each resnet.
        text: `project_text`; of several texts a row with their shares, see `SharedText`. control: one `Injection` for
        each down block and the mid block (four levels in SDXL); None for no control.
        """
        time, text = iter(time), iter(text)
        return self.finish(*self.deep_features(sample, time, text, control), time, text)

    def deep_features(
        self,
        sample: Tensor,
        time: Iterator[Tensor],
        text: Iterator[KeyValue],
        control: Sequence[Injection] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return all before the last up block: what that takes, (B, C, h, w), and its skips."""
        levels = len(self.down_blocks) + 1
        control = [None] * levels if control is None else control
        if len(control) != levels:
            raise ValueError(
                f"control must have {levels} levels (the down blocks and the mid block), got {len(control)}"
            )
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block, level in zip(self.down_blocks, control[:-1], strict=True):
            skips += block(skips[-1], time, text, level)
        x = self.mid_block(skips[-1], time, text, control[-1])
        for block in self.up_blocks[:-1]:
            x = block(x, skips, time, text)
        return x, skips

    def finish(self, deep: Tensor, skips: list[Tensor], time: Iterator, text: Iterator) -> Tensor:
        """Return the last up block and what follows it, on `deep_features`: the prediction."""
        x = self.up_blocks[-1](deep, skips, time, text)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))

    def forward_shallow(
        self,
        sample: Tensor,
        time: Sequence[Tensor],
        text: Sequence[KeyValue],
        control: Sequence[Injection] | None,
        deep: Tensor,
    ) -> Tensor:
        """Return the prediction with another step's deep features: only the finest level is computed (arXiv
        2312.00858).

        Arguments: see `forward`; deep: the first result of `deep_features`, of as many rows and the same size.
        """
        first, last = self.down_blocks[0], self.up_blocks[-1]
        blocks = sum(len(t.transformer_blocks) for t in last.attentions)
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [x, *first.layers(x, iter(time), iter(text), control and control[0])]
        return self.finish(deep, skips, iter(time[-len(last.resnets) :]), iter(text[len(text) - blocks :]))


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> Resnet:
    return Resnet(in_channels, out_channels, config.time_channels, config.norm_num_groups, config.norm_eps)


def _transformers(config: UNetConfig, block_type: str, level: int, count: int) -> list[Transformer]:
    if not block_type.startswith("CrossAttn"):
        return []
    channels, heads = config.block_out_channels[level], config.attention_head_dim[level]
    depth, groups = config.transformer_layers_per_block[level], config.norm_num_groups
    shape = channels, config.cross_attention_dim, heads, depth, groups, config.use_linear_projection
    return [Transformer(*shape) for _ in range(count)]


def _down_blocks(config: UNetConfig) -> list[DownBlock]:
    blocks, incoming, last = [], config.block_out_channels[0], len(config.block_out_channels) - 1
    for level, channels in enumerate(config.block_out_channels):
        count = config.layers_per_block[level]
        resnets = [_resnet(config, channels if i else incoming, channels) for i in range(count)]
        transformers = _transformers(config, config.down_block_types[level], level, count)
        blocks.append(DownBlock(resnets, transformers, None if level == last else channels))
        incoming = channels
    return blocks


def _mid_block(config: UNetConfig) -> MidBlock:
    channels, last = config.block_out_channels[-1], len(config.block_out_channels) - 1
    resnets = [_resnet(config, channels, channels) for _ in range(2)]
    return MidBlock(resnets, _transformers(config, "CrossAttnMid", last, 1))


def _up_blocks(config: UNetConfig) -> list[UpBlock]:
    """From the deepest level up. A block's last skip comes from the level above, the others from its own."""
    blocks, incoming, last = [], config.block_out_channels[-1], len(config.block_out_channels) - 1
    for i, block_type in enumerate(config.up_block_types):
        level = last - i
        channels, above = config.block_out_channels[level], config.block_out_channels[max(level - 1, 0)]
        count = config.layers_per_block[level] + 1
        skips = [channels] * (count - 1) + [above]
        inputs = [incoming] + [channels] * (count - 1)
        resnets = [_resnet(config, x + skip, channels) for x, skip in zip(inputs, skips, strict=True)]
        transformers = _transformers(config, block_type, level, count)
        blocks.append(UpBlock(resnets, transformers, None if level == 0 else channels))
        incoming = channels
    return blocks
