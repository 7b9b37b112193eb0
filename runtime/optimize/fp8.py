"""The UNet's linear layers in float8: half the memory, and on GPUs that have it twice the rate of bfloat16. Lossy.

Weights are scaled row by row once, activations token by token at every call, each to the range of float8 e4m3; the
product is accumulated in float32 and unscaled. Convolutions, norms, and what runs once per image stay as they are.
"""

from __future__ import annotations

from functools import cache

import torch
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.model.unet import ONCE, UNet

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16  # of both widths, which torch's scaled product asks for
OLDEST_GPU = (8, 9)  # compute capability: float8 matrix units
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

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = to_fp8(x.flatten(0, -2))
        y = torch._scaled_mm(rows, self.weight.T, scale, self.scale.T, bias=self.bias, out_dtype=x.dtype)
        return y.unflatten(0, x.shape[:-1])


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> the same in float8, each row scaled to its range, and the scales, (N, 1) float32."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x / scale).to(FP8), scale


def check_quantize(name: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError where `name` is unknown, or the device, the dtype or this torch does not go with it."""
    if name is None:
        return
    if name not in QUANTIZATIONS:
        raise InputError(f"quantize {name!r}: unknown, expected {', '.join(QUANTIZATIONS)}")
    if name == "fp8" and dtype != torch.bfloat16:
        found = str(dtype).removeprefix("torch.")
        raise InputError(f"quantize fp8: float8 products give bfloat16, got {found}; expected dtype bf16")
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
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
    """`unet` with its linear layers exchanged ("fp8"), or kept in float8 between their calls ("fp8-weights")."""
    if name == "fp8-weights":
        direct = (
            () if unet.config.use_linear_projection else ("proj_in$", "proj_out$")
        )  # their weights are read
        skipped = ("norm", "^conv_in$", *direct, *(part.strip(".") for part in ONCE))
        apply_layerwise_casting(unet, FP8, unet.conv_in.weight.dtype, skip_modules_pattern=skipped)
        return unet
    for path, module in list(unet.named_modules()):
        for child_name, child in list(module.named_children()):
            once = any(part in f"{path}.{child_name}." for part in ONCE)
            if (
                isinstance(child, nn.Linear)
                and not once
                and not any(n % MULTIPLE for n in child.weight.shape)
            ):
                setattr(module, child_name, Fp8Linear(child))
    return unet
