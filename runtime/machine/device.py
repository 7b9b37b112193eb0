"""The device, the data type and the kernels' backend that a pipeline runs in."""

from __future__ import annotations

import torch

from kernels import ops
from runtime.errors import InputError
from runtime.machine.arithmetic import DTYPES, warn_if_slow


def pick_device(device: str | torch.device | None) -> torch.device:
    """That device; a GPU where there is one by default. InputError where it is unknown, or not to be had."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device {device!r}: unknown, expected cpu, cuda, cuda:0 ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: no CUDA device is available here, expected cpu")
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(
            f"device {device}: this machine has {torch.cuda.device_count()}; expected cuda:0 ..."
        )
    if device.type not in ("cuda", "cpu"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(
                f"device {device}: this PyTorch or machine has none; expected cpu or cuda"
            ) from error
    if device.type == "meta":
        raise InputError("device meta: it computes nothing; expected cpu, cuda, cuda:0 ...")
    return device


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the named type; by default bf16 on a GPU that has it, fp16 on another GPU, fp32 on a CPU.

    Warns where a CPU is slow in the type that was asked for. Raises InputError where it is unknown.
    """
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if not isinstance(dtype, torch.dtype) and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: unknown, expected {', '.join(DTYPES)}")
    found = DTYPES.get(dtype, dtype)
    warn_if_slow(found, device)
    return found


def check_backend(backend: str, device: torch.device | None = None) -> None:
    """Raise InputError where the kernels' backend is unknown or cannot run here, or not on `device`."""
    try:
        ops.check_backend(backend, device)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error


def check_compile(compiled: bool, cuda_graph: bool, device: torch.device, offload: str | None) -> None:
    """Raise InputError where a UNet cannot be compiled or captured as a CUDA graph on `device`, with this offload."""
    name = "compile" if compiled else "cuda graph"
    if (compiled or cuda_graph) and offload is not None:
        raise InputError(f"{name}: offload {offload} moves the UNet's weights; leave one of them out")
    if cuda_graph and device.type != "cuda":
        raise InputError(f"cuda graph: the device is {device}; expected a CUDA device")
