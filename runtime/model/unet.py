"""SDXL's denoising UNet, written to be read, traced and compiled.

Parameters carry the names of diffusers' UNet2DConditionModel and load strictly from its state dict. What does not
change over the denoising steps is computed once and handed in: the time projections of all steps (`embed_time`),
the keys and values of every cross-attention (`project_text`), the control. Activations are channels_last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from runtime.model.blocks import DownBlock, Injection, KeyValue, MidBlock, SharedText, UpBlock, add_control
from runtime.model.config import UNetConfig
from runtime.model.encoder import Encoder, make_resnet, make_transformers

# In the names of the parameters that run once per image, in `embed_time` and `project_text`, and not in `forward`.
ONCE = ("time_embedding.", "add_embedding.", ".time_emb_proj.", ".attn2.to_k.", ".attn2.to_v.")


class UNet(Encoder):
    """Drop-in for an SDXL UNet2DConditionModel, with everything that is constant over the steps taken out."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        channels = config.block_out_channels
        self.up_blocks = nn.ModuleList(_up_blocks(config))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @classmethod
    def from_diffusers(cls, unet: UNet2DConditionModel) -> UNet:
        """Return a UNet over the same parameter tensors, see `Encoder.adopt`.

        Raises InputError where the config is not SDXL-like, or the weights are not as it says.
        """
        return cls.adopt(unet, UNetConfig.from_diffusers(unet.config))

    def once_per_image(self) -> dict[str, Tensor]:
        """Return the parameters of `embed_time` and `project_text`: `forward` uses all others, and none of these."""
        return {name: p for name, p in self.named_parameters() if any(part in name for part in ONCE)}

    def _blocks(self) -> list[DownBlock | MidBlock | UpBlock]:
        return [*super()._blocks(), *self.up_blocks]

    def forward(
        self,
        sample: Tensor,
        time: Sequence[Tensor],
        text: Sequence[KeyValue | SharedText],
        control: Sequence[Injection] | None = None,
        residuals: Sequence[Injection] | None = None,
    ) -> Tensor:
        """Return the model's prediction, (B, C_out, h, w), channels_last.

        sample: (B, C_in, h, w), any h, w. time: `embed_time` at this step, (B, C) for each resnet.
        text: `project_text`; of several texts a row with their shares, see `SharedText`. control: one `Injection` for
        each down block and the mid block (four levels in SDXL); None for no control. residuals: of ControlNets, one for
        each skip tensor and the mid block.
        """
        time, text = iter(time), iter(text)
        return self.finish(*self.deep_features(sample, time, text, control, residuals), time, text)

    def deep_features(
        self,
        sample: Tensor,
        time: Iterator[Tensor],
        text: Iterator[KeyValue],
        control: Sequence[Injection] | None = None,
        residuals: Sequence[Injection] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return all before the last up block: what that takes, (B, C, h, w), and its skips; see `forward`."""
        levels = len(self.down_blocks) + 1
        control = [None] * levels if control is None else control
        if len(control) != levels:
            raise ValueError(
                f"control must have {levels} levels (the down blocks and the mid block), got {len(control)}"
            )
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = self.go_down(x, time, text, control[:-1])
        x = self.mid_block(skips[-1], time, text, control[-1])
        if residuals is not None:  # after the mid block, which takes the last skip without them
            skips = [add_control(y, level) for y, level in zip([*skips, x], residuals, strict=True)]
            x = skips.pop()
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
        residuals: Sequence[Injection] | None = None,
    ) -> Tensor:
        """Return the prediction with another step's deep features: only the finest level is computed (arXiv
        2312.00858).

        Arguments: see `forward`; deep: the first result of `deep_features`, of as many rows and the same size.
        residuals: of the finest level's skip tensors.
        """
        first, last = self.down_blocks[0], self.up_blocks[-1]
        blocks = sum(len(t.transformer_blocks) for t in last.attentions)
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [x, *first.layers(x, iter(time), iter(text), control and control[0])]
        if residuals is not None:
            skips = [add_control(y, level) for y, level in zip(skips, residuals, strict=True)]
        return self.finish(deep, skips, iter(time[-len(last.resnets) :]), iter(text[len(text) - blocks :]))


def _up_blocks(config: UNetConfig) -> list[UpBlock]:
    """From the deepest level up. A block's last skip comes from the level above, the others from its own."""
    blocks, incoming, last = [], config.block_out_channels[-1], len(config.block_out_channels) - 1
    for i, block_type in enumerate(config.up_block_types):
        level = last - i
        channels, above = config.block_out_channels[level], config.block_out_channels[max(level - 1, 0)]
        count = config.layers_per_block[level] + 1
        skips = [channels] * (count - 1) + [above]
        inputs = [incoming] + [channels] * (count - 1)
        resnets = [make_resnet(config, x + skip, channels) for x, skip in zip(inputs, skips, strict=True)]
        transformers = make_transformers(config, block_type, level, count)
        blocks.append(UpBlock(resnets, transformers, None if level == 0 else channels))
        incoming = channels
    return blocks
