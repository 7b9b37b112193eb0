"""inject: hidden + sum_r scales[r] * masks[r] * features[r], all regions of a level in one launch.

A program owns a tile of pixels x channels of one feature row and adds it to that row's guidance halves, so the
features are read once for both. The traffic is the least there can be: hidden is read and written once, features and
masks are read once. Strengths come from device memory: changing one, 0 included, recompiles and re-captures nothing.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks, reference
from kernels.launching import launch, tuning
from kernels.launching.tiles import tile_at, tile_inside, tile_start

MAX_REGIONS = 8  # of one launch; more take another


@triton.jit
def _inject_fwd_kernel(
    hidden,
    out,
    features,  # REGIONS pointers
    masks,  # REGIONS pointers or None
    scales,  # (REGIONS,) float32
    pixels,
    channels,
    batch,
    hidden_strides,  # of rows, pixels and channels, as all strides here
    out_strides,
    features_strides,
    masks_strides,
    REGIONS: tl.constexpr,
    HALVES: tl.constexpr,  # guidance halves a program serves
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p, c = tile_start(tl.program_id(0), channels, BLOCK_P, BLOCK_C)
    inside = tile_inside(p, c, pixels, channels, BLOCK_P, BLOCK_C)
    b = tl.program_id(1) % batch
    first = tl.program_id(1) // batch * HALVES
    added = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for r in tl.static_range(REGIONS):
        feature = tl.load(
            tile_at(features[r], features_strides[r], b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0
        )
        gate = tl.load(scales + r).to(tl.float32)
        if masks[r] is not None:
            gate = gate * _load_mask(masks[r], masks_strides[r], b, p, pixels, BLOCK_P)
        added += feature.to(tl.float32) * gate
    for half in tl.static_range(HALVES):
        row = (first + half) * batch + b
        x = tl.load(tile_at(hidden, hidden_strides, row, p, c, BLOCK_P, BLOCK_C), inside, other=0.0)
        total = (x.to(tl.float32) + added).to(out.dtype.element_ty)
        tl.store(tile_at(out, out_strides, row, p, c, BLOCK_P, BLOCK_C), total, inside)


@triton.jit
def _inject_bwd_kernel(
    grad,  # of the output, (halves * batch, C, H, W)
    grad_features,  # REGIONS pointers
    masks,
    scales,
    pixels,
    channels,
    batch,
    halves,
    grad_strides,
    features_strides,
    masks_strides,
    SHARED: tl.constexpr,  # REGIONS flags: one row of features served the whole batch and gets all its gradients
    REGIONS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p, c = tile_start(tl.program_id(0), channels, BLOCK_P, BLOCK_C)
    inside = tile_inside(p, c, pixels, channels, BLOCK_P, BLOCK_C)
    b = tl.program_id(1)
    for r in tl.static_range(REGIONS):
        if (not SHARED[r]) or b == 0:
            total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for i in range(b, batch if SHARED[r] else b + 1):
                part = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
                for half in range(halves):
                    row = half * batch + i
                    g = tl.load(tile_at(grad, grad_strides, row, p, c, BLOCK_P, BLOCK_C), inside, other=0.0)
                    part += g.to(tl.float32)
                if masks[r] is not None:
                    part *= _load_mask(masks[r], masks_strides[r], i, p, pixels, BLOCK_P)
                total += part
            total = (total * tl.load(scales + r).to(tl.float32)).to(grad_features[r].dtype.element_ty)
            at = tile_at(grad_features[r], features_strides[r], b, p, c, BLOCK_P, BLOCK_C)
            tl.store(at, total, inside)


@triton.jit
def _load_mask(mask, strides, row, p, pixels, BLOCK_P: tl.constexpr):
    """(BLOCK_P, 1) float32, the same for every channel."""
    start = tl.cast(row, tl.int64) * strides[0] + tl.cast(p, tl.int64) * strides[1]
    offsets = tl.arange(0, BLOCK_P)
    values = tl.load(mask + start + offsets * strides[1], p + offsets < pixels, other=0.0)
    return values.to(tl.float32)[:, None]


@launch.on_device
def inject_fwd(
    hidden: Tensor,
    features: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Tensor,
    out: Tensor,
    sizes: launch.Sizes | None = None,
) -> None:
    """Write the sum into `out`, which may be `hidden`; its H and W must be one dimension in memory."""
    if len(features) > MAX_REGIONS:
        first, rest = slice(MAX_REGIONS), slice(MAX_REGIONS, None)
        inject_fwd(hidden, features[first], masks[first], scales[first], out)
        inject_fwd(out, features[rest], masks[rest], scales[rest], out)
        return
    batch = rows_of(features, masks)
    halves = hidden.shape[0] // batch
    step = 2 if halves % 2 == 0 else 1
    pixels, channels = hidden.shape[2] * hidden.shape[3], hidden.shape[1]
    hidden, hidden_strides = launch.as_pixels(hidden)
    out, out_strides = launch.as_pixels(out)
    maps, maps_strides = _pointers(features)
    gates, gates_strides = _pointers(masks)
    if sizes is None:
        shape = out.dtype, pixels, channels, launch.channels_inner(out_strides), batch, halves, len(features)
        sizes = tuning.pick(
            "inject", shape, out.device,
            lambda: launch.tile(pixels, channels, out_strides, out.itemsize, elements=4096 // out.itemsize),
            lambda sizes: inject_fwd(hidden, features, masks, scales, launch.empty_pixels_like(out), sizes),
        )  # fmt: skip
    grid = launch.count_tiles(pixels, channels, sizes), batch * (halves // step)
    _inject_fwd_kernel[grid](
        hidden, out, maps, gates, scales, pixels, channels, batch,
        hidden_strides, out_strides, maps_strides, gates_strides, REGIONS=len(maps), HALVES=step, **sizes
    )  # fmt: skip


@launch.on_device
def inject_bwd(
    grad: Tensor, features: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor
) -> list[Tensor]:
    """Return gradients of the features, each in its own shape and dtype. Hidden's is `grad` itself."""
    if len(features) > MAX_REGIONS:
        parts = slice(MAX_REGIONS), slice(MAX_REGIONS, None)
        return [g for part in parts for g in inject_bwd(grad, features[part], masks[part], scales[part])]
    grads = [launch.empty_pixels_like(f) for f in features]
    batch = rows_of(features, masks)
    pixels, channels = grad.shape[2] * grad.shape[3], grad.shape[1]
    grad, grad_strides = launch.as_pixels(grad)
    _, maps_strides = _pointers(grads)
    gates, gates_strides = _pointers(masks)
    sizes = launch.tile(pixels, channels, maps_strides[0], grad.itemsize, elements=1024)
    _inject_bwd_kernel[launch.count_tiles(pixels, channels, sizes), batch](
        grad, tuple(grads), gates, scales, pixels, channels, batch, grad.shape[0] // batch,
        grad_strides, maps_strides, gates_strides,
        SHARED=tuple(g.shape[0] < batch for g in grads), REGIONS=len(grads), **sizes
    )  # fmt: skip
    return grads


def rows_of(features: Sequence[Tensor], masks: Sequence[Tensor | None]) -> int:
    """Return the batch that features and masks have, or are broadcast to."""
    return max([t.shape[0] for t in (*features, *masks) if t is not None], default=1)


def _pointers(tensors: Sequence[Tensor | None]) -> tuple[tuple, tuple]:
    """Return the tensors and their strides as a kernel takes them; None stays None."""
    pairs = [(None, None) if t is None else launch.as_pixels(t) for t in tensors]
    return tuple(t for t, _ in pairs), tuple(s for _, s in pairs)


def _inject(
    hidden: Tensor, features: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor
) -> Tensor:
    out = launch.empty_pixels_like(hidden)
    inject_fwd(hidden, features, masks, scales, out)
    return out


def _inject_(
    hidden: Tensor, features: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor
) -> None:
    """Into `hidden`; by way of a copy where another argument lies in its memory, and would be read once that is
    written.
    """
    if any(t is not None and torch._C._is_alias_of(hidden, t) for t in (*features, *masks, scales)):
        hidden.copy_(_inject(hidden, features, masks, scales))
        return
    inject_fwd(hidden, features, masks, scales, hidden)
    torch.autograd.graph.increment_version(hidden)  # what a gradient needs is not changed unseen


def _inject_backward(
    grad: Tensor, features: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor
) -> list[Tensor]:
    return inject_bwd(grad, features, masks, scales)


inject_op = torch.library.custom_op("localcontrol::inject", _inject, mutates_args=())
inject_op_ = torch.library.custom_op("localcontrol::inject_", _inject_, mutates_args=("hidden",))
inject_backward_op = torch.library.custom_op(
    "localcontrol::inject_backward", _inject_backward, mutates_args=()
)


@inject_op.register_fake
def _(hidden, features, masks, scales):
    return launch.empty_pixels_like(hidden)


@inject_backward_op.register_fake
def _(grad, features, masks, scales):
    return [launch.empty_pixels_like(f) for f in features]


def _setup_context(ctx, inputs, output) -> None:
    _, features, masks, scales = inputs
    ctx.regions = len(features)
    ctx.save_for_backward(*features, *masks, scales)


def _backward(ctx, grad):
    features, masks = ctx.saved_tensors[: ctx.regions], ctx.saved_tensors[ctx.regions : -1]
    grads = [None] * ctx.regions
    if any(ctx.needs_input_grad[1]):
        grads = inject_backward_op(grad, features, masks, ctx.saved_tensors[-1])
    # as autograd wants it: a list with a None in it is one argument, a list of tensors is one argument each
    no_masks = None if any(m is None for m in masks) else [None] * ctx.regions
    return grad, grads, no_masks, None


inject_op.register_autograd(_backward, setup_context=_setup_context)


def inject(
    hidden: Tensor,
    features: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    scales: Tensor,
    *,
    inplace: bool = False,
) -> Tensor:
    """`reference.inject` as one kernel. Gradients: hidden and features."""
    features = list(features)
    masks = [None] * len(features) if masks is None else list(masks)
    checks.check_inject(hidden, features, masks, scales)
    if not features or hidden.numel() == 0:
        return reference.inject(hidden, features, masks, scales, inplace=inplace)
    args = hidden, features, masks, scales.contiguous()
    overlaps = (
        0 in hidden.stride()
    )  # rows that share memory: copy_ refuses them as PyTorch's own operations do
    if inplace and launch.is_pixels(hidden) and not overlaps and not launch.needs_grad(*args):
        launch.call(_inject_, inject_op_, *args)
        return hidden
    out = launch.call(_inject, inject_op, *args)
    return hidden.copy_(out) if inplace else out
