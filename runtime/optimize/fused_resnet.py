"""Residual blocks whose biases cost no pass over the pixels.

On a GPU PyTorch adds a convolution's bias in a launch of its own, and so the time projection: 1.1 of the 29.8 ms of an
SDXL step on an H200, 5.9 of the 51 ms of its VAE's decoder. Here the first convolution's bias and the time projection
are the offset of the norm that follows, which moves a mean; the second one's goes into the shortcut's product.
"""

from __future__ import annotations

from operator import is_

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from runtime.model.blocks import Resnet
from runtime.optimize.exchange import exchange


class WithoutBias(nn.Conv2d):
    """A convolution whose bias somebody else adds."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None)


class ProductShortcut(nn.Conv2d):
    """A 1x1 convolution as a product of pixels, which adds its own bias and `other`, that of the block's second
    convolution.
    """

    summed, versions = (), []  # the biases that the sum was made of, and autograd's count of their changes

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """other: or None for the sum of both as it was kept last."""
        pixels = x.permute(0, 2, 3, 1)  # contiguous: x is channels_last
        both = self.both if other is None else self.bias + other
        # rows, as of an image PyTorch makes a product and a sum
        rows = F.linear(pixels.flatten(0, 2), self.weight.flatten(1), both)
        return rows.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)

    @torch.no_grad()
    def keep(self, other: Tensor) -> None:
        """Keep the sum of both biases where they are others than before, in the memory that it had: a graph that was
        captured reads it there.
        """
        biases = self.bias, other
        versions = [None if bias.is_inference() else bias._version for bias in biases]  # None: there is none
        if None not in versions and versions == self.versions and all(map(is_, biases, self.summed)):
            return
        both = self.bias + other.to(self.bias.device)  # either may be offloaded
        if "both" in self._buffers:
            self.both.copy_(both)
        else:
            self.register_buffer("both", both, persistent=False)
        self.summed, self.versions = biases, versions


class FusedResnet(Resnet):
    """A block of the UNet, on the projections of its own `project_time`."""

    def project_time(self, embedding: Tensor) -> Tensor:
        """Return it with the first convolution's bias. Once per image, and weights may have changed since the last."""
        if isinstance(self.conv_shortcut, ProductShortcut):
            self.conv_shortcut.keep(self.conv2.bias)
        return super().project_time(embedding) + self.conv1.bias.to(embedding.device)  # it may be offloaded

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.norm2(self.conv1(self.norm1(x)), time)
        learns = torch.is_grad_enabled() and self.conv2.bias.requires_grad
        return _add(self.conv2(h), _shortcut(self, x, keeps=not learns))


class FusedVaeResnet(ResnetBlock2D):
    """A block of the VAE: no time, and neither up- nor downsampling."""

    def forward(self, x: Tensor, *_, **__) -> Tensor:
        h = self.norm2(self.conv1(self.norm1(x)), self.conv1.bias[None])
        h = _add(self.conv2(self.dropout(h)), _shortcut(self, x))
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def fuse_resnet(resnet: Resnet | ResnetBlock2D) -> None:
    """Exchange a block and its convolutions, in place; its norms take an offset, and apply the activation. Nothing is
    done where a convolution was exchanged for another kind of layer, as for weights in float8.
    """
    shortcut = resnet.conv_shortcut
    convolutions = resnet.conv1, resnet.conv2, *([shortcut] if _is_layer(shortcut) else [])
    if not all(isinstance(layer, nn.Conv2d) for layer in convolutions):
        return
    exchange(resnet, FusedResnet if isinstance(resnet, Resnet) else FusedVaeResnet)
    exchange(resnet.conv1, WithoutBias)
    if _is_layer(shortcut) and shortcut.bias is not None:
        exchange(resnet.conv2, WithoutBias)
        exchange(shortcut, ProductShortcut)
        if isinstance(resnet, Resnet):
            shortcut.keep(resnet.conv2.bias)


def _shortcut(resnet: Resnet | ResnetBlock2D, x: Tensor, keeps: bool = False) -> Tensor:
    """Return the way around the block. keeps: with the sum of biases that was kept, which has no gradient."""
    layer = resnet.conv_shortcut
    if isinstance(layer, ProductShortcut):
        return layer(x, None if keeps else resnet.conv2.bias)
    return layer(x) if _is_layer(layer) else x


def _is_layer(shortcut: nn.Module | None) -> bool:
    return shortcut is not None and not isinstance(shortcut, nn.Identity)


def _add(fresh: Tensor, x: Tensor) -> Tensor:
    """fresh + x, in place of `fresh` where no gradient is recorded."""
    return fresh + x if torch.is_grad_enabled() else fresh.add_(x)
