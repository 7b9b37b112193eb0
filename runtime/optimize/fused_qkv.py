"""Query, key and value of self-attention as one linear layer: one product, wide enough to fill the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.model.attention import attend
from runtime.model.blocks import Attention, TransformerBlock
from runtime.model.encoder import Encoder
from runtime.optimize.exchange import exchange


class FusedSelfAttention(Attention):
    """Attention of tokens among themselves; `to_qkv` is in the place of to_q, to_k and to_v."""

    def of_itself(self, x: Tensor) -> Tensor:
        rows = self.to_qkv(x).unflatten(2, (3, self.heads, -1))  # (B, S, 3, heads, D)
        return self.to_out(attend(*(part.transpose(1, 2) for part in rows.unbind(2))))


def fuse_qkv(encoder: Encoder) -> Encoder:
    """`encoder`, a UNet or a ControlNet, with its self-attentions exchanged, one after the other: those three weights
    are copied, then gone.
    """
    for block in encoder.modules():
        if isinstance(block, TransformerBlock) and not isinstance(block.attn1, FusedSelfAttention):
            attention = block.attn1
            parts = [attention.to_q, attention.to_k, attention.to_v]
            weight = torch.cat([layer.weight.detach() for layer in parts])
            with torch.device("meta"):
                attention.to_qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            attention.to_qkv.weight = nn.Parameter(weight, requires_grad=False)
            del attention.to_q, attention.to_k, attention.to_v
            exchange(attention, FusedSelfAttention)
    return encoder
