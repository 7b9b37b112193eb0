"""geglu: (a + bias_a) * gelu(g + bias_g) of the two halves of the last dimension, one launch each way. On request in
float8, for a product in that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks, reference
from kernels.float8_rows import as_float8_rows, empty_float8, to_float8
from kernels.launching import launch, tuning
from kernels.launching.tiles import tile_at, tile_inside, tile_start
from kernels.reference import Float8Rows

SQRT_HALF = tl.constexpr(0.7071067811865476)
GAUSS_SCALE = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _geglu_fwd_kernel(
    x, bias, out, rows, channels, x_strides, out_strides, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    p, c = tile_start(tl.program_id(0), channels, BLOCK_P, BLOCK_C)
    inside = tile_inside(p, c, rows, channels, BLOCK_P, BLOCK_C)
    value, gate = _halves(x, bias, x_strides, p, c, channels, inside, BLOCK_P, BLOCK_C)
    result = value * gate * _normal_cdf(gate)
    at = tile_at(out, out_strides, 0, p, c, BLOCK_P, BLOCK_C)
    tl.store(at, result.to(out.dtype.element_ty), inside)


@triton.jit
def _geglu_float8_kernel(
    x, bias, out, scales, rows, channels, x_strides, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A program has whole rows: out (rows, channels), contiguous, and scales (rows,)."""
    p = tl.program_id(0) * BLOCK_P
    inside = tile_inside(p, 0, rows, channels, BLOCK_P, BLOCK_C)
    value, gate = _halves(x, bias, x_strides, p, 0, channels, inside, BLOCK_P, BLOCK_C)
    result, scale = to_float8(tl.where(inside, value * gate * _normal_cdf(gate), 0.0))
    tl.store(tile_at(out, (0, channels, 1), 0, p, 0, BLOCK_P, BLOCK_C), result, inside)
    row = p + tl.arange(0, BLOCK_P)[:, None]
    tl.store(scales + row, scale, row < rows)


@triton.jit
def _geglu_bwd_kernel(
    x,
    bias,
    grad,  # (rows, channels)
    grad_x,  # (rows, 2 channels)
    rows,
    channels,
    x_strides,
    grad_strides,
    grad_x_strides,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p, c = tile_start(tl.program_id(0), channels, BLOCK_P, BLOCK_C)
    inside = tile_inside(p, c, rows, channels, BLOCK_P, BLOCK_C)
    value, gate = _halves(x, bias, x_strides, p, c, channels, inside, BLOCK_P, BLOCK_C)
    g = tl.load(tile_at(grad, grad_strides, 0, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
    cdf = _normal_cdf(gate)
    slope = cdf + gate * GAUSS_SCALE * tl.exp(-0.5 * gate * gate)
    dtype = grad_x.dtype.element_ty
    at = tile_at(grad_x, grad_x_strides, 0, p, c, BLOCK_P, BLOCK_C)
    tl.store(at, (g * gate * cdf).to(dtype), inside)
    tl.store(at + channels * grad_x_strides[2], (g * value * slope).to(dtype), inside)


@triton.jit
def _halves(x, bias, strides, p, c, channels, inside, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Value and gate with their biases, (BLOCK_P, BLOCK_C) float32 each."""
    at = tile_at(x, strides, 0, p, c, BLOCK_P, BLOCK_C)
    value = tl.load(at, inside, other=0.0).to(tl.float32)
    gate = tl.load(at + channels * strides[2], inside, other=0.0).to(tl.float32)
    if bias is not None:
        column = c + tl.arange(0, BLOCK_C)
        exists = column < channels
        value += tl.load(bias + column, exists, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + channels + column, exists, other=0.0).to(tl.float32)[None, :]
    return value, gate


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1 + tl.erf(x * SQRT_HALF))


@launch.on_device
def geglu_fwd(x: Tensor, bias: Tensor | None, sizes: launch.Sizes | None = None) -> Tensor:
    """Return (M, 2 C) -> (M, C)."""
    rows, channels = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, channels)
    strides = 0, *x.stride()
    if sizes is None:
        shape = x.dtype, rows, channels, launch.channels_inner(strides)
        sizes = tuning.pick(
            "geglu", shape, x.device,
            lambda: launch.tile(rows, channels, strides, x.itemsize),
            lambda sizes: geglu_fwd(x, bias, sizes),
        )  # fmt: skip
    _geglu_fwd_kernel[(launch.count_tiles(rows, channels, sizes),)](
        x, bias, out, rows, channels, strides, (0, *out.stride()), **sizes
    )
    return out


@launch.on_device
def geglu_float8_fwd(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (M, 2 C) -> (M, C) in float8 and the scales, (M, 1)."""
    rows, channels = x.shape[0], x.shape[1] // 2
    out, scales = empty_float8(x, channels)
    sizes = launch.whole_rows(channels, x.itemsize)
    _geglu_float8_kernel[(launch.cdiv(rows, sizes["BLOCK_P"]),)](
        x, bias, out, scales, rows, channels, (0, *x.stride()), **sizes
    )
    return out, scales


@launch.on_device
def geglu_bwd(grad: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return gradient of x, (M, 2 C); the bias's is its sum over the rows."""
    rows, channels = grad.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    strides = 0, *x.stride()
    sizes = launch.tile(rows, channels, strides, x.itemsize, elements=1024)
    _geglu_bwd_kernel[(launch.count_tiles(rows, channels, sizes),)](
        x, bias, grad, grad_x, rows, channels, strides, (0, *grad.stride()), (0, *grad_x.stride()), **sizes
    )
    return grad_x


def _geglu(x: Tensor, bias: Tensor | None) -> Tensor:
    return geglu_fwd(x, bias)


geglu_op = torch.library.custom_op("localcontrol::geglu", _geglu, mutates_args=())
geglu_float8_op = torch.library.custom_op("localcontrol::geglu_float8", geglu_float8_fwd, mutates_args=())
geglu_backward_op = torch.library.custom_op("localcontrol::geglu_backward", geglu_bwd, mutates_args=())


@geglu_op.register_fake
def _(x, bias):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@geglu_float8_op.register_fake
def _(x, bias):
    return empty_float8(x, x.shape[1] // 2)


@geglu_backward_op.register_fake
def _(grad, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x = geglu_backward_op(grad, x, bias)
    if not ctx.needs_input_grad[1]:
        return grad_x, None
    return grad_x, grad_x.sum(0, dtype=torch.float32).to(bias.dtype)


geglu_op.register_autograd(_backward, setup_context=_setup_context)


def geglu(x: Tensor, bias: Tensor | None = None, *, float8: bool = False) -> Tensor | Float8Rows:
    """`reference.geglu` as one kernel. Gradients, but for float8: x and bias."""
    checks.check_geglu(x, bias)
    shape = *x.shape[:-1], x.shape[-1] // 2
    if x.numel() == 0 or (float8 and shape[-1] > launch.LONGEST_ROW):
        return reference.geglu(x, bias, float8=float8)
    args = x.reshape(-1, x.shape[-1]), None if bias is None else bias.contiguous()
    if float8:
        return as_float8_rows(*launch.call(geglu_float8_fwd, geglu_float8_op, *args), shape)
    return launch.call(_geglu, geglu_op, *args).view(shape)
