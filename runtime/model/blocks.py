"""The blocks of SDXL's UNet. Attribute names are those of diffusers' state dict; C channels, B batch, S tokens.

`time` iterates over the resnets' time projections (B, C), `text` over the cross-attentions' (key, value), each in
the order of the forward pass: a block takes the next one for every resnet and every transformer block it runs.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops
from runtime.model.attention import attend

KeyValue = tuple[Tensor, Tensor]
# Key and value of P texts, (B, P, heads, S, C / heads), and each text's share at every position, (B, P, h, w)
SharedText = tuple[Tensor, Tensor, Tensor]


class Injection(NamedTuple):
    """What one level of the UNet is given, as `kernels.ops.inject` takes it.

    features: R tensors (B or 1, C, h, w). masks: R tensors (B or 1, 1, h, w), each of them or all None. scales: (R,).
    """

    features: Sequence[Tensor]
    masks: Sequence[Tensor | None] | None
    scales: Tensor


class Resnet(nn.Module):
    """Two 3x3 convolutions around the time projection, (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.activation = nn.SiLU()

    def project_time(self, embedding: Tensor) -> Tensor:
        """Return what `forward` takes of the time, (..., C_out), of its embedding (..., C)."""
        return self.time_emb_proj(embedding)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """time: `project_time`, (B, C_out)."""
        h = self.conv1(self.activation(self.norm1(x))) + time[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(self.activation(self.norm2(h)))


class Attention(nn.Module):
    """Multi-head attention of C-channel tokens over a context of `context_channels`."""

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def project(self, context: Tensor) -> KeyValue:
        """Return key and value of a context (B, S, D), each (B, heads, S, C / heads)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, shares: Tensor | None = None) -> Tensor:
        """Attend to one text, or to several whose results are mixed by their shares; see `SharedText`."""
        query = self._split(self.to_q(x))
        if shares is None:
            return self.to_out(attend(query, key, value))
        # One by one, not as a batch: OpenVINO's attention of queries that are expanded is wrong by percents.
        found = (attend(query, key[:, i], value[:, i]) for i in range(key.shape[1]))
        mixed = None
        for result, share in zip(found, shares.flatten(2)[..., None].unbind(1), strict=True):
            mixed = result * share if mixed is None else torch.addcmul(mixed, result, share)
        return self.to_out(mixed)

    def of_itself(self, x: Tensor) -> Tensor:
        """Self-attention."""
        return self(x, *self.project(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """Linear to twice the width, one half gated by the GELU of the other."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # net.1 is diffusers' dropout, which SDXL leaves at 0
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention over the text, feed-forward; tokens (B, h*w, C)."""

    def __init__(self, channels: int, text_channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, text_channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: KeyValue | SharedText) -> Tensor:
        x = self.attn1.of_itself(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), *text) + x
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    """Transformer blocks over the pixels of an image, (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, text_channels: int, heads: int, depth: int, groups: int, linear: bool):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        blocks = [TransformerBlock(channels, text_channels, heads) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Iterator[KeyValue]) -> Tensor:
        tokens = self.tokens_of(x)
        for block in self.transformer_blocks:
            tokens = block(tokens, next(text))
        return self.add_tokens(x, tokens)

    def tokens_of(self, x: Tensor) -> Tensor:
        """Return the first block's input, (B, h*w, C)."""
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # a view: x is channels_last
        return self._project(self.proj_in, tokens)

    def add_tokens(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return x and the last block's output."""
        tokens = self._project(self.proj_out, tokens)
        return tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2) + x

    @staticmethod
    def _project(layer: nn.Module, tokens: Tensor) -> Tensor:
        """Return a 1x1 convolution is a linear layer on tokens."""
        if isinstance(layer, nn.Conv2d):
            return F.linear(tokens, layer.weight.flatten(1), layer.bias)
        return layer(tokens)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class DownBlock(nn.Module):
    """Resnets (each followed by its transformer where there are any), then a downsampler except at the last level."""

    def __init__(self, resnets: list[Resnet], transformers: list[Transformer], downsample: int | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(transformers)
        self.downsamplers = nn.ModuleList([] if downsample is None else [Downsample(downsample)])

    def forward(self, x: Tensor, time: Iterator, text: Iterator, control: Injection | None) -> list[Tensor]:
        """Return the outputs of every layer, for the skips; the last one is the block's output."""
        outputs = self.layers(x, time, text, control)
        for downsampler in self.downsamplers:
            outputs.append(downsampler(outputs[-1]))
        if not self.attentions:
            outputs[-1] = add_control(outputs[-1], control)
        return outputs

    def layers(self, x: Tensor, time: Iterator, text: Iterator, control: Injection | None) -> list[Tensor]:
        """Return the outputs before the downsampler.

        diffusers adds the control before the downsampler where there is attention, after it where there is none;
        either way the skip connection carries the sum.
        """
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(time))
            if self.attentions:
                x = self.attentions[i](x, text)
            outputs.append(x)
        if self.attentions:
            outputs[-1] = add_control(x, control)
        return outputs


class MidBlock(nn.Module):
    """Resnet, transformer, resnet, or a resnet alone, then the control."""

    def __init__(self, resnets: list[Resnet], transformers: list[Transformer]):
        super().__init__()
        self.attentions = nn.ModuleList(transformers)
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor, time: Iterator, text: Iterator, control: Injection | None) -> Tensor:
        x = self.resnets[0](x, next(time))
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, text), next(time))
        return add_control(x, control)


class UpBlock(nn.Module):
    """Resnets on the output and its skip (each followed by its transformer), then an upsampler except at the last."""

    def __init__(self, resnets: list[Resnet], transformers: list[Transformer], upsample: int | None):
        super().__init__()
        self.attentions = nn.ModuleList(transformers)
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList([] if upsample is None else [Upsample(upsample)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Iterator, text: Iterator) -> Tensor:
        """Pops its skips off the list; upsamples to the size of the next one, which an odd size needs."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), next(time))
            if self.attentions:
                x = self.attentions[i](x, text)
        for upsampler in self.upsamplers:
            x = upsampler(x, skips[-1].shape[2:])
        return x


def add_control(x: Tensor, control: Injection | None) -> Tensor:
    """Return x plus one level's gated features; in place where no gradient is recorded."""
    if control is None:
        return x
    return ops.inject(x, *control, inplace=not torch.is_grad_enabled())
