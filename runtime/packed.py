"""A UNet for a CPU that computes in bfloat16: weights in the layout that its matrix units read, quicker norms.

PyTorch hands oneDNN plain weights, which it lays out anew at every call: of SDXL's 5 GB that is a fifth of a step at
512 x 512 (benchmarks/results/cpu/full_size.csv). Here they are laid out once; what is computed stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.unet import UNet
from runtime.unet_blocks import Transformer


class Packed(nn.Module):
    """A layer with a weight that only oneDNN can read: for inference."""

    def __deepcopy__(self, memo) -> Packed:
        return self  # nothing changes it, and such a weight has no copy


class PackedLinear(Packed):
    """nn.Linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight: (out, in)."""
        super().__init__()
        self.out_features = len(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedConv2d(Packed):
    """nn.Conv2d, channels_last in and out."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.shape = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.shape, None)
        self.bias = None if conv.bias is None else conv.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.shape, "none", [], "")


class NarrowGroupNorm(nn.GroupNorm):
    """nn.GroupNorm, channels_last in and out, of few channels a group.

    Up to PIXELS PyTorch walks such a group a few elements at a time (torch 2.13: 0.79 ms for 16 x 64 x 16 x 16);
    turned to NCHW and back it takes 0.14 ms. Larger pictures go another way there, which is quick.
    """

    PIXELS, WIDTH = 1024, 16

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] > self.PIXELS:
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def packs_here(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `pack_weights` helps: on a CPU with matrix units for it."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_weights(unet: UNet) -> UNet:
    """`unet` with its linear layers and convolutions packed, one after the other; their parameters are gone then."""
    for module in list(unet.modules()):
        if (
            isinstance(module, nn.GroupNorm)
            and module.num_channels // module.num_groups < NarrowGroupNorm.WIDTH
        ):
            module.__class__ = NarrowGroupNorm
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif isinstance(child, nn.Conv2d) and isinstance(module, Transformer):  # 1x1, on tokens
                setattr(module, name, PackedLinear(child.weight.flatten(1), child.bias))
            elif isinstance(child, nn.Conv2d):
                setattr(module, name, PackedConv2d(child))
    return unet


def is_packed(unet: UNet) -> bool:
    return any(isinstance(module, Packed) for module in unet.modules())
