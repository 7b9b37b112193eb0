"""ControlNets of SDXL (arXiv 2302.05543): a copy of the UNet's encoder that is shown a condition, and the residuals it
adds to the UNet's skip tensors and mid block.

Parameters carry the names of diffusers' ControlNetModel, or ControlNetUnionModel, and load strictly from its state
dict. What the condition gives is computed once per picture (`embed_condition`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.controlnets.controlnet_union import ResidualAttentionBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from runtime.model.blocks import KeyValue, SharedText
from runtime.model.config import MID_BLOCKS, ControlNetConfig
from runtime.model.encoder import Encoder


class ControlNet(Encoder):
    """Drop-in for a ControlNetModel of SDXL, with everything that is constant over the steps taken out.

    assumed: options of its config that its file does not say.
    """

    assumed: tuple[str, ...] = ()

    def __init__(self, config: ControlNetConfig):
        super().__init__(config, mid_attends=config.mid_block_type == MID_BLOCKS[0])
        channels = config.block_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            channels[0], config.conditioning_channels, config.conditioning_embedding_out_channels
        )
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in config.skip_channels)
        self.controlnet_mid_block = nn.Conv2d(channels[-1], channels[-1], 1)

    @staticmethod
    def from_diffusers(net: ControlNetModel | ControlNetUnionModel, control: int | None = None) -> ControlNet:
        """Return one over the same parameter tensors, see `Encoder.adopt`. control: which of a union's it is.

        Raises InputError where the config is not SDXL-like, or the weights are not as it says.
        """
        union = isinstance(net, ControlNetUnionModel)
        config = ControlNetConfig.from_diffusers(net.config, union)
        return ControlNetUnion.adopt(net, config, control) if union else ControlNet.adopt(net, config)

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Return what a condition (B, C, H, W) in [0, 1] adds to conv_in's output: (B, C_0, H / 8, W / 8)."""
        condition = condition.to(self.conv_in.weight.dtype)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            condition = condition.flip(1)
        return self.controlnet_cond_embedding(condition.contiguous(memory_format=torch.channels_last))

    def forward(
        self,
        sample: Tensor,
        time: Sequence[Tensor],
        text: Sequence[KeyValue | SharedText],
        condition: Tensor,
    ) -> list[Tensor]:
        """Return the residuals of every skip tensor, and of the mid block.

        sample: (B, C_in, h, w). time, text: as `UNet.forward`'s, of this net. condition: of `embed_condition`, B or
        1 rows.
        """
        time, text = iter(time), iter(text)
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last)) + condition
        skips = self.go_down(x, time, text, [None] * len(self.down_blocks))
        x = self.mid_block(skips[-1], time, text, None)
        residuals = [conv(y) for conv, y in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [*residuals, self.controlnet_mid_block(x)]

    def forward_shallow(
        self,
        sample: Tensor,
        time: Sequence[Tensor],
        text: Sequence[KeyValue | SharedText],
        condition: Tensor,
    ) -> list[Tensor]:
        """Return the residuals of the finest level alone, before it is halved; see `UNet.forward_shallow`."""
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last)) + condition
        skips = [x, *self.down_blocks[0].layers(x, iter(time), iter(text), None)]
        return [conv(y) for conv, y in zip(self.controlnet_down_blocks, skips, strict=False)]


class ControlNetUnion(ControlNet):
    """Drop-in for a ControlNetUnionModel of which one control is used at a time.

    Its transformer attends along the batch (nn.MultiheadAttention takes (S, B, C), and is handed (B, S, C)), whose
    rows are all the same here: the condition's. So what it gives is the same at every step, and known beforehand.
    """

    def __init__(self, config: ControlNetConfig, control: int):
        """control: from 0, below config.num_control_type."""
        super().__init__(config)
        self.control = control
        width = config.num_trans_channel
        self.task_embedding = nn.Parameter(torch.empty(config.num_control_type, width))
        blocks = [ResidualAttentionBlock(width, config.num_trans_head) for _ in range(config.num_trans_layer)]
        self.transformer_layes = nn.ModuleList(blocks)  # diffusers' spelling
        self.spatial_ch_projs = nn.Linear(width, config.block_out_channels[0])
        embed = config.addition_time_embed_dim
        self.control_type_proj = Timesteps(embed, config.flip_sin_to_cos, config.freq_shift)
        self.control_add_embedding = TimestepEmbedding(embed * config.num_control_type, config.time_channels)

    def embed_condition(self, condition: Tensor) -> Tensor:
        """See `ControlNet.embed_condition`."""
        found = super().embed_condition(condition)
        x = (found.mean(dim=(2, 3)) + self.task_embedding[self.control])[
            None
        ]  # along S = 1: each row by itself
        for layer in self.transformer_layes:
            x = layer(x)
        return found + self.spatial_ch_projs(x[0])[:, :, None, None]

    def embed_image(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """See `Encoder.embed_image`: the kind of control is a part of it."""
        kinds = torch.zeros(self.config.num_control_type, device=pooled.device)
        kinds[self.control] = 1
        dtype = self.conv_in.weight.dtype
        kind = self.control_add_embedding(self.control_type_proj(kinds).flatten()[None].to(dtype))
        return super().embed_image(pooled, time_ids) + kind
