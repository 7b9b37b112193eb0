"""The public door to the ops: one signature each, dispatched to a backend.

"torch" is the specification in plain PyTorch. "triton" are the kernels; it is an error where they cannot run. "auto",
the default, takes the kernels for CUDA tensors they support and plain PyTorch for all others. `use_backend` sets the
backend for a block of code, in its own thread or task only; what the environment variable LOCALCONTROL_KERNELS says at
import is what "auto" stands for. A graph of torch.compile keeps the backend it was traced with.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels import reference
from kernels.reference import Float8Rows

BACKENDS = ("auto", "triton", "torch")
VARIABLE = "LOCALCONTROL_KERNELS"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on CPU tensors
HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_GPU = (8, 0)  # compute capability: bfloat16
FLOAT8_GPU = (8, 9)

_of_auto = os.environ.get(VARIABLE, "auto")  # what "auto" stands for in this process
_backend = ContextVar("localcontrol_backend", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of this block on `name`: "auto", "triton" or "torch".

    Raises ValueError for another name, RuntimeError for "triton" where no kernel can run.
    """
    check_backend(name)
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def resolve(backend: str) -> str:
    """Return what `backend` stands for: "auto" for that of LOCALCONTROL_KERNELS. Raises ValueError for another name."""
    _check_name(backend, "backend")
    if backend != "auto":
        return backend
    _check_name(_of_auto, VARIABLE)
    return _of_auto


@torch.compiler.assume_constant_result  # dynamo cannot trace a ContextVar
def current_backend() -> str:
    """Return the backend that ops run on in this thread or task, resolved."""
    return resolve(_backend.get())


def check_backend(name: str, device: torch.device | None = None) -> None:
    """Raise ValueError unless `name` is a backend, RuntimeError unless it can run in this process, and on `device`."""
    source = "backend" if name == resolve(name) else VARIABLE
    if resolve(name) != "triton":
        return
    runs = INTERPRETED or (device.type == "cuda" if device is not None else torch.cuda.is_available())
    if not (HAS_TRITON and runs):
        found = "" if device is None else f", and the device is {device}"
        raise RuntimeError(
            f"{source} 'triton' needs the package triton and a CUDA device (or TRITON_INTERPRET=1){found}; "
            "use 'auto' or 'torch'"
        )
    if device is not None and device.type == "cuda" and not _is_recent(device, OLDEST_GPU):
        oldest = ".".join(map(str, OLDEST_GPU))
        raise RuntimeError(
            f"{source} 'triton' needs a GPU of compute capability {oldest} or later; use 'auto' or 'torch'"
        )


def inject(
    hidden: Tensor,
    features: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    scales: Tensor,
    *,
    inplace: bool = False,
) -> Tensor:
    """hidden + sum_r scales[r] * masks[r] * features[r]; see `reference.inject` for shapes and errors."""
    op = _implementation("inject", (hidden, *features), (*(masks or ()), scales))
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
    op = _implementation("sobel_z0_loss", (model_output,), (noisy, latents, mask, alpha, sigma))
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
    op = _implementation("noise_and_z0_loss", (model_output,), (noisy, latents, mask, alpha, sigma))
    return op(model_output, noisy, latents, mask, alpha, sigma, prediction_type, edges=edges)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    *,
    offset: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + offset)), or the norm alone; see `reference.group_norm_silu`."""
    op = _implementation("group_norm_silu", (x, weight, bias), (offset,))
    return op(x, weight, bias, num_groups, eps, silu, offset=offset)


def geglu(x: Tensor, bias: Tensor | None = None, *, float8: bool = False) -> Tensor | Float8Rows:
    """value * gelu(gate), the halves of the last dimension of x + bias; see `reference.geglu`."""
    given = ((), (x, bias), FLOAT8_GPU) if float8 else ((x, bias),)
    return _implementation("geglu", *given)(x, bias, float8=float8)


def float8_rows(x: Tensor) -> Float8Rows:
    """x in float8, row by row; see `reference.float8_rows`."""
    return _implementation("float8_rows", (), (x,), FLOAT8_GPU)(x)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    float8: bool = False,
) -> tuple[Tensor, Tensor | Float8Rows]:
    """x + residual and its layer normalisation; see `reference.add_layer_norm`."""
    images, parameters = (x, residual), (weight, bias)
    given = ((), images + parameters, FLOAT8_GPU) if float8 else (images, parameters)
    op = _implementation("add_layer_norm", *given)
    return op(x, residual, weight, bias, eps, float8=float8)


def guidance_step(
    sample: Tensor,
    output: Tensor,
    coefficients: Tensor,
    previous: Tensor | None = None,
    *,
    rescale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Guidance, its rescaling and one step of a linear sampler; see `reference.guidance_step`."""
    op = _implementation("guidance_step", (), (sample, output, coefficients, previous))
    return op(sample, output, coefficients, previous, rescale=rescale)


def _implementation(
    name: str,
    differentiable: Sequence[Tensor | None],
    constant: Sequence[Tensor | None] = (),
    oldest: tuple[int, int] = OLDEST_GPU,
) -> Callable:
    """Return the op of the chosen backend. constant: the arguments for which the kernels have no gradient. oldest:
    compute capability that they need.
    """
    backend = current_backend()
    tensors = [t for t in (*differentiable, *constant) if t is not None]
    if backend == "torch" or (backend == "auto" and not tensors[0].is_cuda):
        return getattr(reference, name)
    obstacle = _obstacle(tensors, constant, oldest)
    if obstacle is None:
        from kernels import triton_ops

        return getattr(triton_ops, name)
    if backend == "triton":
        raise RuntimeError(f"{name}: the triton backend {obstacle}; use 'auto' or 'torch'")
    return getattr(reference, name)


def _obstacle(
    tensors: Sequence[Tensor], constant: Sequence[Tensor | None], oldest: tuple[int, int]
) -> str | None:
    """Why the kernels cannot take these tensors, None where they can."""
    device = tensors[0].device
    if not HAS_TRITON:
        return "needs the package triton"
    if not (INTERPRETED or device.type == "cuda"):
        return f"needs CUDA tensors, or TRITON_INTERPRET=1, got {device.type} tensors"
    if any(t.device != device for t in tensors):
        return f"needs all tensors on one device, got {', '.join(sorted({str(t.device) for t in tensors}))}"
    if device.type == "cuda" and not _is_recent(device, oldest):
        return f"needs a GPU of compute capability {'.'.join(map(str, oldest))} or later"
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"takes float32, float16 and bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in constant):
        return "has no gradient for an argument that requires one"
    if _is_transformed():
        return "has no forward-mode derivatives and no transforms of torch.func"
    return None


@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    """Return whether tensors here may carry tangents, or stand for others: a kernel would lose what it cannot see."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def _is_recent(device: torch.device, oldest: tuple[int, int]) -> bool:
    return torch.cuda.get_device_capability(device) >= oldest


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
