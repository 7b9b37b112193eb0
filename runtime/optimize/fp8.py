"""The UNet's weights in float8: half the memory, and on GPUs that have it twice the rate of bfloat16. Lossy.

"fp8": linear layers multiply in float8. Weights are scaled row by row once, activations token by token at every call,
each to the range of float8 e4m3; the product is accumulated in float32 and unscaled. "fp8-weights": linear layers and
convolutions keep their weights so, and multiply in the model's dtype. Norms, and what runs once per image, stay as they
are.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops, reference
from kernels.reference import Float8Rows
from runtime.errors import InputError
from runtime.model.unet import ONCE, UNet

PRODUCT = torch.bfloat16  # what torch's scaled product gives
MULTIPLE = 16  # of both widths, which torch's scaled product asks for
QUANTIZATIONS = ("fp8", "fp8-weights")


class Fp8Linear(nn.Module):
    """nn.Linear with weight and input in float8."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features = linear.out_features
        weight, scale = to_fp8(linear.weight.detach())
        self.register_buffer("weight", weight)  # (out, in)
        self.register_buffer("scale", scale)  # (out, 1)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor | Float8Rows) -> Tensor:
        values, scales = x if isinstance(x, Float8Rows) else ops.float8_rows(x)
        rows = values.flatten(0, -2), self.weight.T, scales.flatten(0, -2), self.scale.T
        return torch._scaled_mm(*rows, bias=self.bias, out_dtype=PRODUCT).unflatten(0, values.shape[:-1])


class StoredLinear(nn.Module):
    """nn.Linear with its weight kept in float8, in the input's dtype while it computes."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.out_features = len(layer.weight)
        weight, scale = to_fp8(layer.weight.detach())
        self.register_buffer("stored", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in `dtype`."""
        return (self.stored.to(self.scale.dtype) * self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(x.dtype), self.bias)


class StoredConv2d(StoredLinear):
    """nn.Conv2d, likewise."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.shape = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(x.dtype), self.bias, *self.shape)


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N, ...) in float8, each of the N scaled to its range, and the scales, (N, 1 ...) float32."""
    rows = reference.float8_rows(weight.flatten(1))
    return rows.values.view(weight.shape), rows.scales.view(-1, *[1] * (weight.ndim - 1))


def check_quantize(name: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError where `name` is unknown, or the device, the dtype or this torch does not go with it."""
    if name is None:
        return
    if name not in QUANTIZATIONS:
        raise InputError(f"quantize {name!r}: unknown, expected {', '.join(QUANTIZATIONS)}")
    if name == "fp8" and dtype != PRODUCT:
        found = str(dtype).removeprefix("torch.")
        raise InputError(f"quantize fp8: float8 products give bfloat16, got {found}; expected dtype bf16")
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < ops.FLOAT8_GPU:
        raise InputError("quantize fp8: this GPU has no float8 matrix units; expected fp8-weights")
    if name == "fp8" and not multiplies_here(device):
        raise InputError(
            f"quantize fp8: torch {torch.__version__} has no row-wise float8 product on {device.type}; "
            "use fp8-weights, or a newer torch"
        )


@cache
def multiplies_here(device: torch.device) -> bool:
    """Return whether this torch multiplies in float8 on `device`; on a CPU 2.11 does not, 2.13 does."""
    layer = nn.Linear(MULTIPLE, MULTIPLE, device=device, dtype=torch.bfloat16)
    try:
        Fp8Linear(layer)(torch.ones(1, MULTIPLE, device=device, dtype=torch.bfloat16))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


def quantize(unet: UNet, name: str) -> UNet:
    """Exchange the UNet's layers, in place, for those of one of QUANTIZATIONS."""
    kinds = {nn.Linear: Fp8Linear} if name == "fp8" else {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}
    for path, module in list(unet.named_modules()):
        for child_name, child in list(module.named_children()):
            if type(child) in kinds and _may_be_stored(f"{path}.{child_name}".lstrip("."), child, name):
                setattr(module, child_name, kinds[type(child)](child))
    return unet


def _may_be_stored(path: str, layer: nn.Linear | nn.Conv2d, name: str) -> bool:
    """Return whether a layer goes into float8: not one that runs once per image, nor one whose weight is read."""
    if any(part in f"{path}." for part in ONCE) or path == "conv_in":  # its dtype is the UNet's
        return False
    if name == "fp8":
        return not any(n % MULTIPLE for n in layer.weight.shape)
    return not (isinstance(layer, nn.Conv2d) and path.endswith(("proj_in", "proj_out")))
