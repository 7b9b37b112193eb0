"""The public door to the ops: one signature each, dispatched to a backend.

The backend is "auto" (the fastest one the tensors allow), "triton" or "torch"; the environment variable
LOCALCONTROL_KERNELS sets it for the process, `use_backend` for a block of code.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from kernels import reference

BACKENDS = ("auto", "triton", "torch")
VARIABLE = "LOCALCONTROL_KERNELS"

_backend = os.environ.get(VARIABLE, "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of this block on `name`: "auto", "triton" or "torch".

    Raises ValueError for another name, RuntimeError for a backend that cannot run here.
    """
    global _backend
    _implementation(name, "backend")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def inject(
    hidden: Tensor,
    features: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    scales: Tensor,
    *,
    inplace: bool = False,
) -> Tensor:
    """hidden + sum_r scales[r] * masks[r] * features[r]; see `reference.inject` for shapes and errors."""
    return _implementation(_backend).inject(hidden, features, masks, scales, inplace=inplace)


def sobel_z0_loss(
    model_output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    mask: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str = "epsilon",
) -> Tensor:
    """Masked Sobel distance of the predicted and the true latent, (B,); see `reference.sobel_z0_loss`."""
    op = _implementation(_backend).sobel_z0_loss
    return op(model_output, noisy, latents, mask, alpha, sigma, prediction_type)


def _implementation(name: str, source: str = VARIABLE) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton":
        raise RuntimeError("the triton backend has no kernels in this version; use 'auto' or 'torch'")
    return reference
