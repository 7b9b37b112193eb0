"""sobel_z0_loss: masked distance between the edges of the predicted and of the true latent, one launch each way.

A program takes a strip of rows of one channel (of every channel where channels are innermost in memory) and walks
down it: each row is read once, at its pixels and their horizontal neighbours, and what the two rows above contribute
waits in registers. Forward, every program writes its partial sum and the last one of a sample adds them up in a fixed
order: one launch, and the same bits every time. Backward, the edges are computed again; only the inputs are saved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.edges import (
    adjoint_across,
    adjoint_down,
    edge_of,
    edge_slope,
    load_mask,
    noise_difference,
    planes_at,
    prediction_slope,
    row_sums,
)
from kernels.launching import launch


@triton.jit
def _loss_fwd_kernel(
    latents,  # pointers to model output, z_t, z0 and mask: (B, C, h, w) each
    strides,  # of each of the four
    alpha,
    sigma,
    partials,  # (1 or 2, B, programs) float32: sums of the edge loss and of the noise loss
    tickets,  # (B,) int32 zeros, and zeros again when the launch has ended
    losses,  # (1 or 2, B) float32
    height,
    width,
    scale,  # 1 / (C h w)
    INNER: tl.constexpr,  # channels, where they are innermost in memory; otherwise 1
    EDGES: tl.constexpr,
    PREDICTION: tl.constexpr,
    NOISE: tl.constexpr,  # whether the noise loss is asked for
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,  # of a sample, rounded up to a power of two
):
    b = tl.program_id(1)
    x, channel, top = _place(height, width, INNER, ROWS, BLOCK)
    bottom = tl.minimum(top + ROWS, height)
    planes = planes_at(latents, strides, b, channel)
    a, s = tl.load(alpha + b).to(tl.float32), tl.load(sigma + b).to(tl.float32)
    edge, noise = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    up, middle = _no_row(BLOCK), _no_row(BLOCK)
    for row in range(top - 1, bottom + 1):
        below = row_sums(planes, strides, row, x, height, width, a, s, EDGES, PREDICTION)
        found = edge_of(up[0], middle[0], below[0], up[1], middle[1], below[1], EDGES)
        wanted = edge_of(up[2], middle[2], below[2], up[3], middle[3], below[3], EDGES)
        difference = (found - wanted) * load_mask(planes, strides, row - 1, x, height, width)
        edge += tl.where(row > top, difference * difference, 0.0)
        if NOISE:
            difference = noise_difference(planes, strides, row, x, height, width, a, s, PREDICTION)
            noise += tl.where((row >= top) & (row < bottom), difference * difference, 0.0)
        up = middle
        middle = below

    batch, programs = tl.num_programs(1), tl.num_programs(0)
    mine = partials + b * programs + tl.program_id(0)
    tl.store(mine, tl.sum(tl.where(x < width, edge, 0.0)))
    if NOISE:
        tl.store(mine + batch * programs, tl.sum(tl.where(x < width, noise, 0.0)))
    tl.debug_barrier()  # the partial sums are written before the ticket is drawn
    if tl.atomic_add(tickets + b, 1, sem="acq_rel") == programs - 1:
        _finish(partials + b * programs, losses + b, programs, scale, PROGRAMS)
        if NOISE:
            _finish(partials + (batch + b) * programs, losses + batch + b, programs, scale, PROGRAMS)
        tl.store(tickets + b, 0)


@triton.jit
def _finish(partials, loss, programs, scale, PROGRAMS: tl.constexpr):
    i = tl.arange(0, PROGRAMS)
    # .cg: from L2, where the other blocks' sums are
    tl.store(loss, tl.sum(tl.load(partials + i, i < programs, other=0.0, cache_modifier=".cg")) * scale)


@triton.jit
def _loss_bwd_kernel(
    latents,
    strides,
    alpha,
    sigma,
    grad_losses,  # (1 or 2, B)
    grad_output,  # (B, C, h, w)
    grad_strides,
    height,
    width,
    scale,
    INNER: tl.constexpr,
    EDGES: tl.constexpr,
    PREDICTION: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1)
    x, channel, top = _place(height, width, INNER, ROWS, BLOCK)
    bottom = tl.minimum(top + ROWS, height)
    planes = planes_at(latents, strides, b, channel)
    a, s = tl.load(alpha + b).to(tl.float32), tl.load(sigma + b).to(tl.float32)
    edge_scale = tl.load(grad_losses + b) * 2 * scale * prediction_slope(a, s, PREDICTION)
    noise_scale = tl.load(grad_losses + tl.num_programs(1) + b) * 2 * scale if NOISE else 0.0
    out = grad_output + tl.cast(b, tl.int64) * grad_strides[0] + channel * grad_strides[1]

    # three windows a row, around the pixels left of, at, and right of this one: the edges there depend on it
    up_l, up_m, up_r = _no_row(BLOCK), _no_row(BLOCK), _no_row(BLOCK)
    mid_l, mid_m, mid_r = _no_row(BLOCK), _no_row(BLOCK), _no_row(BLOCK)
    p_up, p_mid, q_up, q_mid = _no_row(BLOCK)
    for row in range(top - 2, bottom + 2):
        # clamped windows at a border see pixels that the border's own window does not: _adjoint_across drops them
        low_l = row_sums(planes, strides, row, x - 1, height, width, a, s, EDGES, PREDICTION)
        low_m = row_sums(planes, strides, row, x, height, width, a, s, EDGES, PREDICTION)
        low_r = row_sums(planes, strides, row, x + 1, height, width, a, s, EDGES, PREDICTION)
        al, bl = edge_slope(up_l, mid_l, low_l, EDGES)
        am, bm = edge_slope(up_m, mid_m, low_m, EDGES)
        ar, br = edge_slope(up_r, mid_r, low_r, EDGES)
        wl = load_mask(planes, strides, row - 1, x - 1, height, width)
        wm = load_mask(planes, strides, row - 1, x, height, width)
        wr = load_mask(planes, strides, row - 1, x + 1, height, width)
        wl, wm, wr = wl * wl, wm * wm, wr * wr
        p, q = adjoint_across(
            al * wl, am * wm, ar * wr, bl * wl, bm * wm, br * wr, x == 0, x == width - 1, EDGES
        )
        y = row - 2  # the rows around this one are complete
        grad = adjoint_down(p_up, p_mid, p, q_up, q_mid, q, y == 0, y == height - 1, EDGES) * edge_scale
        if NOISE:
            grad += noise_difference(planes, strides, y, x, height, width, a, s, PREDICTION) * noise_scale
        at = out + y * grad_strides[2] + x * grad_strides[3]
        # the rows above the strip are another program's
        columns = tl.where(y >= top, width, 0)
        tl.store(at, grad.to(grad_output.dtype.element_ty), x < columns)
        up_l, up_m, up_r = mid_l, mid_m, mid_r
        mid_l, mid_m, mid_r = low_l, low_m, low_r
        p_up, p_mid, q_up, q_mid = p_mid, p, q_mid, q


@triton.jit
def _no_row(BLOCK: tl.constexpr):
    """Four values of their own, all 0, for `row_sums` of a row above the strip.

    Of their own: Triton takes a variable that a loop sets to another one's value for unchanged where both begin as the
    same value, and does not carry it to the next turn (3.6 to 3.8; its interpreter does).
    """
    return (
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
    )


@triton.jit
def _place(height, width, INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's columns and channels, (BLOCK,) each or one of them a scalar, and the first row of its strip."""
    tiles, strips = tl.cdiv(width * INNER, BLOCK), tl.cdiv(height, ROWS)
    program = tl.program_id(0)
    i = program % tiles * BLOCK + tl.arange(0, BLOCK)
    channel = program // (tiles * strips) + i % INNER  # one of the two is 0
    return i // INNER, channel, program // tiles % strips * ROWS


@launch.on_device
def z0_losses_fwd(
    model_output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    mask: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    edges: str,
    noise: bool,
) -> Tensor:
    """Return (1, B) float32, the edge loss; with `noise` (2, B), below it the mean squared error of the output."""
    tensors, batch = (model_output, noisy, latents, mask), model_output.shape[0]
    sizes, programs, numbers = _launch(model_output)
    options = {"dtype": torch.float32, "device": model_output.device}
    losses = torch.empty(1 + noise, batch, **options)
    _loss_fwd_kernel[programs, batch](
        tensors, _strides(tensors), alpha.contiguous(), sigma.contiguous(),
        torch.empty(1 + noise, batch, programs, **options), launch.tickets(model_output.device, batch), losses,
        *numbers, **_constants(prediction_type, edges, noise), **sizes, PROGRAMS=launch.power_of_2(programs)
    )  # fmt: skip
    return losses


@launch.on_device
def z0_losses_bwd(
    grad_losses: Tensor,
    model_output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    mask: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    edges: str,
    noise: bool,
) -> Tensor:
    """Return gradient of the model output, in its dtype and memory format."""
    tensors, grad = (model_output, noisy, latents, mask), torch.empty_like(model_output)
    sizes, programs, numbers = _launch(model_output)
    _loss_bwd_kernel[programs, model_output.shape[0]](
        tensors, _strides(tensors), alpha.contiguous(), sigma.contiguous(), grad_losses.contiguous(),
        grad, grad.stride(), *numbers, **_constants(prediction_type, edges, noise), **sizes
    )  # fmt: skip
    return grad


def _launch(model_output: Tensor) -> tuple[launch.Sizes, int, tuple[int, int, float]]:
    """Block sizes, programs a sample, and height, width and 1 / (C h w)."""
    batch, channels, height, width = model_output.shape
    inner = channels if model_output.stride(1) < model_output.stride(3) else 1
    sizes = launch.strip(width * inner, height, batch * (channels // inner)) | {"INNER": inner}
    tiles = launch.cdiv(width * inner, sizes["BLOCK"]) * launch.cdiv(height, sizes["ROWS"])
    return sizes, tiles * (channels // inner), (height, width, 1 / (channels * height * width))


def _strides(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the tensors' strides; that of the batch is 0 where one row serves all of it."""
    return tuple((0 if t.shape[0] == 1 else t.stride(0), *t.stride()[1:]) for t in tensors)


def _constants(prediction_type: str, edges: str, noise: bool) -> dict[str, int | bool]:
    return {
        "EDGES": checks.EDGES.index(edges),
        "PREDICTION": checks.PREDICTION_TYPES.index(prediction_type),
        "NOISE": noise,
    }


z0_losses_op = torch.library.custom_op("localcontrol::z0_losses", z0_losses_fwd, mutates_args=())
z0_losses_backward_op = torch.library.custom_op(
    "localcontrol::z0_losses_backward", z0_losses_bwd, mutates_args=()
)


@z0_losses_op.register_fake
def _(model_output, noisy, latents, mask, alpha, sigma, prediction_type, edges, noise):
    return model_output.new_empty(1 + noise, model_output.shape[0], dtype=torch.float32)


@z0_losses_backward_op.register_fake
def _(grad_losses, model_output, *_):
    return torch.empty_like(model_output)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.prediction_type, ctx.edges, ctx.noise = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    grad_output = z0_losses_backward_op(grad, *ctx.saved_tensors, ctx.prediction_type, ctx.edges, ctx.noise)
    return grad_output, *(None,) * 8


z0_losses_op.register_autograd(_backward, setup_context=_setup_context)


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
    """`reference.sobel_z0_loss` in one launch each way. Gradient: model_output."""
    return _losses(model_output, noisy, latents, mask, alpha, sigma, prediction_type, edges, False)[0]


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
    """`reference.noise_and_z0_loss` in one launch each way. Gradient: model_output."""
    losses = _losses(model_output, noisy, latents, mask, alpha, sigma, prediction_type, edges, True)
    return losses[1], losses[0]


def _losses(model_output: Tensor, *args) -> Tensor:
    checks.check_loss(model_output, *args[:-1])
    if model_output.numel() == 0:
        return model_output.flatten(1).float().sum(1).expand(2, -1)  # zeros that have a gradient
    return launch.call(z0_losses_fwd, z0_losses_op, model_output, *args)
