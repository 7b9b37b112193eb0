"""Kinds of CPU to pretend to be on: what oneDNN has kernels for there, and how long a small product takes."""

from dataclasses import dataclass

import torch

from runtime.machine import arithmetic


@dataclass(frozen=True)
class Kind:
    """seconds: of a product of each data type. kernels: the types that oneDNN has some for. bf16, fp16: the choice."""

    name: str
    seconds: dict[torch.dtype, float]
    kernels: tuple[torch.dtype, ...]
    bf16: bool
    fp16: bool


def _kind(name: str, bf16: float, fp16: float, *kernels: torch.dtype, quick: str = "") -> Kind:
    """bf16, fp16: seconds of a product, for 1 in float32."""
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16, torch.float16: fp16}
    return Kind(name, seconds, kernels, "bf16" in quick, "fp16" in quick)


BF16, FP16 = torch.bfloat16, torch.float16
KINDS = [
    _kind("AVX2 only", 60, 60),
    _kind("AVX2 only, busy", 1.2, 1.2),  # another process held up the float32 product
    _kind("AVX512 without bf16", 2.1, 60, BF16),
    _kind("AVX512-bf16", 0.45, 60, BF16, quick="bf16"),
    _kind("AMX", 0.15, 30, BF16, quick="bf16"),
    _kind("AMX with fp16", 0.15, 0.2, BF16, FP16, quick="bf16 fp16"),
]


def pretend(kind: Kind, monkeypatch) -> Kind:
    """Be on such a CPU until the test ends."""
    monkeypatch.setattr(arithmetic, "product_seconds", kind.seconds.__getitem__)
    monkeypatch.setattr(arithmetic, "has_kernels", lambda dtype: dtype in kind.kernels)
    return kind
