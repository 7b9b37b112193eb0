"""The one table of tolerances: relative RMS error allowed, for each kind of comparison and dtype.

The reference is always computed in float32 or float64. Never looser on a build machine.
"""

import torch
from torch import Tensor

RELATIVE_RMS = {
    # one op against its definition in float64: a few roundings of the output's dtype
    "op": {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4},
    # the same from Triton's interpreter, which cuts float32 off where a GPU rounds it to bfloat16: twice the error
    "interpreted": {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 4e-4},
    "gradient": {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
    # a whole UNet against diffusers': hundreds of ops in another order
    "unet": {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3},
    "unet gradient": {torch.float64: 1e-12, torch.float32: 1e-5},
    # gradients of a whole training step, through hundreds of bfloat16 layers
    "training step": {torch.bfloat16: 1e-1},
}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected values; NaN where either has a NaN."""
    actual, expected = actual.double(), expected.double()
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return ((actual - expected).square().mean().sqrt() / scale).item()


def assert_close(name: str, actual: Tensor, expected: Tensor, kind: str = "op") -> None:
    """Fail, naming the tensor, unless `actual` is within its dtype's tolerance of `expected`."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    error, limit = relative_rms(actual, expected), RELATIVE_RMS[kind][actual.dtype]
    assert error <= limit, f"{name}: relative RMS error {error:.2e} > {limit:.0e}"
