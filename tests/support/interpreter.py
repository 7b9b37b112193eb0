"""Triton's interpreter, mended where it computes something else than a GPU."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from kernels import ops

# What a test runs without a GPU
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not ops.INTERPRETED, reason="not interpreted")),
]

_convert = interpreter._convert_float


def _converted(data, source, target, rounding_mode):
    """To float8 as PyTorch and a GPU do it: the interpreter's own (3.7) loses a carry into the exponent, what is
    below the smallest normal number, and NaN.
    """
    if (source, target) != (tl.float32, tl.float8e4nv):
        return _convert(data, source, target, rounding_mode)
    values = torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn)
    return values.view(torch.uint8).numpy()


interpreter._convert_float = _converted
