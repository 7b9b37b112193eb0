"""A UNet for a CPU: weights in the layout that oneDNN's kernels read, quicker norms.

In bfloat16 PyTorch hands oneDNN plain weights, which it lays out anew at every call: of SDXL's 5 GB that is a tenth of
a step at 512 x 512 (benchmarks/results/cpu/full_size.csv), and a fifth on a CPU with AMX. In float32 it hands linear
layers to MKL, which on an AMD EPYC takes 2.3 times oneDNN's time. Here weights are laid out once, for oneDNN; what is
computed stays the same.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor, nn

from runtime.machine.arithmetic import has_kernels
from runtime.machine.report import cpu_vendor
from runtime.model.blocks import GEGLU, Transformer
from runtime.model.encoder import Encoder
from runtime.optimize.exchange import exchange

MOST_SIZES = 4096  # of inputs, that a convolution knows its weights for


class Packed(nn.Module):
    """A layer with a weight that only oneDNN can read: for inference."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute as oneDNN does, or as a plain layer, slowly, where a gradient is recorded: oneDNN's operators have
        none, and would cut it off.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return self.plain()(x)
        # autocast casts nothing for these operators; asked first, as `to` takes ten times as long to do nothing
        return self.packed(x if x.dtype is self.dtype else x.to(self.dtype))

    def __deepcopy__(self, memo) -> Packed:
        return self  # nothing changes it, and such a weight has no copy


class PackedLinear(Packed):
    """nn.Linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight: (out, in)."""
        super().__init__()
        self.out_features, self.dtype = len(weight), weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def packed(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def plain(self) -> nn.Linear:
        return filled(
            nn.Linear(*reversed(self.weight.shape), device="meta"), self.weight.to_dense(), self.bias
        )


class PackedGEGLU(Packed):
    """GEGLU: each half a product of its own, the gate's with its GELU, so that no half is read for that again."""

    def __init__(self, proj: nn.Linear):
        super().__init__()
        self.value, self.gate = (
            PackedLinear(weight, bias)
            for weight, bias in zip(proj.weight.chunk(2), proj.bias.chunk(2), strict=True)
        )
        self.dtype = proj.weight.dtype

    def packed(self, x: Tensor) -> Tensor:
        gate = self.gate
        gated = torch.ops.mkldnn._linear_pointwise(x, gate.weight, gate.bias, "gelu", [], "none")
        return gated.mul_(self.value(x))

    def plain(self) -> GEGLU:
        value, gate = self.value.plain(), self.gate.plain()
        with torch.device("meta"):
            geglu = GEGLU(value.in_features, value.out_features)
        filled(geglu.proj, torch.cat([value.weight, gate.weight]), torch.cat([value.bias, gate.bias]))
        return geglu


class PackedConv2d(Packed):
    """nn.Conv2d of one group, channels_last in and out.

    oneDNN chooses the layout of a weight by the input's size, and takes 100 times a convolution's time to turn one
    into another. Where a size wants its own, a weight is kept for it too.
    """

    SIZES = tuple(product((1, 2, 16), (4, 8, 16, 32, 64, 128)))  # (rows, side) of usual inputs

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.shape = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        self.dtype = conv.weight.dtype
        rows, side = self.SIZES[-1]
        self.weight = reordered(conv.weight.detach(), self.shape, (rows, side, side))
        self.bias = None if conv.bias is None else conv.bias.detach()
        self._by_layout = {layout(self.weight): self.weight}
        self._by_size: dict[tuple[int, ...], Tensor] = {}  # rows, height, width and threads: its weight

    def packed(self, x: Tensor) -> Tensor:
        rows, _, *sides = x.shape
        size = rows, *sides, torch.get_num_threads()
        weight = self._by_size.get(size)
        if weight is None:
            if len(self._by_size) >= MOST_SIZES:
                self._by_size.clear()
            weight = self._by_size[size] = self._for(size[:-1])
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.shape, "none", [], "")

    def _for(self, size: tuple[int, int, int]) -> Tensor:
        """Return the weight in the layout for inputs of `size`: rows, height, width."""
        wanted = layout_for(self.weight.shape, self.shape, self.weight.dtype, size)
        if wanted not in self._by_layout:
            self._by_layout[wanted] = reordered(self._dense(), self.shape, size)
        return self._by_layout[wanted]

    def _dense(self) -> Tensor:
        return self.weight.to_dense().contiguous(memory_format=torch.channels_last)

    def plain(self) -> nn.Conv2d:
        (padding, stride, dilation, groups), weight = self.shape, self._dense()
        out_channels, in_channels, *kernel = weight.shape
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, device="meta")
        return filled(conv, weight, self.bias)


def filled(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """`layer`, made without memory, with these parameters."""
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def reordered(weight: Tensor, shape: tuple, size: tuple[int, int, int]) -> Tensor:
    """Return a convolution's weight as oneDNN wants it for inputs of `size`: rows, height, width.

    shape: padding, stride, dilation and groups.
    """
    rows, *sides = size
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, [rows, weight.shape[1], *sides])


def has_one_layout(conv: nn.Conv2d) -> bool:
    """Return whether oneDNN wants the weight of `conv` in the same layout at every usual size."""
    shape = conv.padding, conv.stride, conv.dilation, conv.groups
    layouts = (
        layout_for(conv.weight.shape, shape, conv.weight.dtype, (rows, side, side))
        for rows, side in PackedConv2d.SIZES
    )
    first = next(layouts)
    return all(each == first for each in layouts)


def layout_for(weight: torch.Size, shape: tuple, dtype: torch.dtype, size: tuple[int, int, int]) -> bytes:
    """Return the layout that oneDNN wants of a weight for inputs of `size`; it depends on the threads, too."""
    *pairs, groups = shape
    return _layout_for(tuple(weight), (*map(tuple, pairs), groups), dtype, size, torch.get_num_threads())


@lru_cache(maxsize=2**16)
def _layout_for(
    weight: tuple[int, ...], shape: tuple, dtype: torch.dtype, size: tuple, threads: int
) -> bytes:
    return layout(reordered(torch.zeros(weight, dtype=dtype), shape, size))


def layout(packed: Tensor) -> bytes:
    """Return how a packed weight lies in memory: oneDNN's description of it."""
    words = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).view(torch.int32).clone()
    words[27] = 0  # padding behind the data type, which is never written
    return words.numpy().tobytes()


class NarrowGroupNorm(nn.GroupNorm):
    """nn.GroupNorm, channels_last in and out, of few channels a group.

    Below PIXELS PyTorch walks such a group a few elements at a time (torch 2.13: 0.79 ms for 16 x 64 x 16 x 16);
    turned to NCHW and back it takes 0.14 ms. Larger pictures go another way there, which is quick.
    """

    PIXELS, WIDTH = 1024, 16

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] >= self.PIXELS:
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


@lru_cache
def packs_here(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `pack_weights` helps: on a CPU that computes in bfloat16, or is quicker in float32 without MKL."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return mkl_is_slow()
    return dtype == torch.bfloat16 and has_kernels(dtype)


def mkl_is_slow() -> bool:
    """Return whether MKL has float32's products on a CPU of another maker, where its kernels are not the quick ones.

    By name and not by time: a process that once found the other answer, on a busy machine, would draw pictures whose
    last bits differ.
    """
    return torch.backends.mkl.is_available() and cpu_vendor() in ("AuthenticAMD", "HygonGenuine")


def pack_weights(encoder: Encoder) -> Encoder:
    """`encoder`, a UNet or a ControlNet, with its linear layers and convolutions packed, one after the other; their
    parameters are gone then.

    A convolution stays as it is where its layout depends on the size of the picture.
    """
    kept = GEGLU, nn.MultiheadAttention  # packed as a whole; reads its layer's weight itself
    for module in [m for m in encoder.modules() if list(m.children()) and not isinstance(m, kept)]:
        for name, child in list(module.named_children()):
            setattr(module, name, _packed(child, on_tokens=isinstance(module, Transformer)))
    return encoder


def _packed(layer: nn.Module, on_tokens: bool) -> nn.Module:
    """Return what takes the place of `layer`; on_tokens: of a 1x1 convolution that is a linear layer on tokens."""
    if isinstance(layer, GEGLU):
        return PackedGEGLU(layer.proj)
    if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and on_tokens):
        return PackedLinear(layer.weight.flatten(1), layer.bias)
    if isinstance(layer, nn.Conv2d) and has_one_layout(layer):
        return PackedConv2d(layer)
    if isinstance(layer, nn.GroupNorm) and layer.num_channels // layer.num_groups < NarrowGroupNorm.WIDTH:
        exchange(layer, NarrowGroupNorm)
    return layer


def unpack_weights(encoder: Encoder) -> Encoder:
    """`encoder` with plain layers again, and its values: for a compiler, which does not look into packed ones."""
    for module in [m for m in encoder.modules() if not isinstance(m, Packed)]:
        if isinstance(module, NarrowGroupNorm):
            exchange(module, nn.GroupNorm)
        for name, child in list(module.named_children()):
            if isinstance(child, Packed):
                setattr(module, name, child.plain())
    return encoder
