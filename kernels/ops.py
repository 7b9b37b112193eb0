"""The public door to the ops: one signature each, dispatched to a backend.

"torch" is the specification in plain PyTorch. "triton" are the kernels; it is an error where they cannot run. "auto",
the default, takes the kernels for CUDA tensors they support and plain PyTorch for all others. The environment variable
LOCALCONTROL_KERNELS sets the backend for the process, `use_backend` for a block of code.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels import reference

BACKENDS = ("auto", "triton", "torch")
VARIABLE = "LOCALCONTROL_KERNELS"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on CPU tensors
HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_GPU = (8, 0)  # compute capability: bfloat16

_backend = os.environ.get(VARIABLE, "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of this block on `name`: "auto", "triton" or "torch".

    Raises ValueError for another name, RuntimeError for "triton" where no kernel can run.
    """
    global _backend
    _check_backend(name, "backend")
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
    op = _find("inject", (hidden, *features), (*(masks or ()), scales))
    return op(hidden, features, masks, scales, inplace=inplace)


def sobel_z0_loss(
    model_output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    mask: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str = "epsilon",
    *,
    edges: str = "sobel",
) -> Tensor:
    """Masked Sobel distance of the predicted and the true latent, (B,); see `reference.sobel_z0_loss`."""
    op = _find("sobel_z0_loss", (model_output,), (noisy, latents, mask, alpha, sigma))
    return op(model_output, noisy, latents, mask, alpha, sigma, prediction_type, edges=edges)


def noise_and_z0_loss(
    model_output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    mask: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str = "epsilon",
    *,
    edges: str = "sobel",
) -> tuple[Tensor, Tensor]:
    """Both terms of the training loss from one reading of the tensors; see `reference.noise_and_z0_loss`."""
    op = _find("noise_and_z0_loss", (model_output,), (noisy, latents, mask, alpha, sigma))
    return op(model_output, noisy, latents, mask, alpha, sigma, prediction_type, edges=edges)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """silu(group_norm(x)), or the norm alone; see `reference.group_norm_silu`."""
    return _find("group_norm_silu", (x, weight, bias))(x, weight, bias, num_groups, eps, silu)


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """value * gelu(gate), the halves of the last dimension of x + bias; see `reference.geglu`."""
    return _find("geglu", (x, bias))(x, bias)


def guidance_step(
    sample: Tensor,
    output: Tensor,
    coefficients: Tensor,
    previous: Tensor | None = None,
    *,
    rescale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Guidance, its rescaling and one step of a linear sampler; see `reference.guidance_step`."""
    op = _find("guidance_step", (), (sample, output, coefficients, previous))
    return op(sample, output, coefficients, previous, rescale=rescale)


def _find(
    name: str, differentiable: Sequence[Tensor | None], constant: Sequence[Tensor | None] = ()
) -> Callable:
    """The op of the chosen backend. `constant`: the arguments for which the kernels have no gradient."""
    _check_name(_backend, VARIABLE)
    tensors = [t for t in (*differentiable, *constant) if t is not None]
    if _backend == "torch" or (_backend == "auto" and not tensors[0].is_cuda):
        return getattr(reference, name)
    obstacle = _obstacle(tensors, constant)
    if obstacle is None:
        from kernels import triton_ops

        return getattr(triton_ops, name)
    if _backend == "triton":
        raise RuntimeError(f"{name}: the triton backend {obstacle}; use 'auto' or 'torch'")
    return getattr(reference, name)


def _obstacle(tensors: Sequence[Tensor], constant: Sequence[Tensor | None]) -> str | None:
    """Why the kernels cannot take these tensors, None where they can."""
    device = tensors[0].device
    if not HAS_TRITON:
        return "needs the package triton"
    if not (INTERPRETED or device.type == "cuda"):
        return f"needs CUDA tensors, or TRITON_INTERPRET=1, got {device.type} tensors"
    if any(t.device != device for t in tensors):
        return f"needs all tensors on one device, got {', '.join(sorted({str(t.device) for t in tensors}))}"
    if device.type == "cuda" and not _is_recent(device):
        return f"needs a GPU of compute capability {'.'.join(map(str, OLDEST_GPU))} or later"
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"takes float32, float16 and bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in constant):
        return "has no gradient for an argument that requires one"
    return None


@torch.compiler.assume_constant_result
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= OLDEST_GPU


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")


def _check_backend(name: str, source: str) -> None:
    """That `name` is a backend, and one that can run here."""
    _check_name(name, source)
    if name == "triton" and not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())):
        raise RuntimeError(
            f"{source} 'triton' needs the package triton and a CUDA device (or TRITON_INTERPRET=1); "
            "use 'auto' or 'torch'"
        )
