"""Results that are numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.errors import InputError
from runtime.machine.arithmetic import name_of


def check_finite(tensor: Tensor, stage: str, dtype: torch.dtype) -> None:
    """Raise InputError, naming the stage and the dtype it computed in, where a result is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        advice = "" if dtype == torch.float32 else "; try dtype fp32"
        raise InputError(
            f"{stage}: the result has NaN or infinite values (computed in {name_of(dtype)}){advice}"
        )
