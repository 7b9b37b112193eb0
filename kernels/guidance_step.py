"""guidance_step: classifier-free guidance, its rescaling and a step of the sampler in one pass over the latents.

Euler, DDIM and DPM++ 2M differ only in five numbers a step, which come from device memory: a captured graph, or a
step compiled once, serves every step of every schedule.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launching import launch
from kernels.launching.tiles import tile_at, tile_inside, tile_start


@triton.jit
def _guidance_step_kernel(
    sample,
    output,  # (batch, ...), or (2 batch, ...) with the unguided rows first
    previous,  # or None
    coefficients,  # (6,) float32
    following,
    denoised,
    rescale,
    pixels,
    channels: tl.constexpr,
    sample_strides,
    output_strides,
    previous_strides,
    following_strides,
    denoised_strides,
    GUIDED: tl.constexpr,
    RESCALE: tl.constexpr,  # the standard deviations need the whole sample: one program a sample then
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, batch = tl.program_id(1), tl.num_programs(1)
    guidance = tl.load(coefficients)
    of_sample, of_output = tl.load(coefficients + 1), tl.load(coefficients + 2)
    keep, move, momentum = tl.load(coefficients + 3), tl.load(coefficients + 4), tl.load(coefficients + 5)
    tiles = tl.cdiv(pixels, BLOCK_P) * tl.cdiv(channels, BLOCK_C)
    factor = 1.0
    if RESCALE:
        factor = _rescale_factor(
            output, output_strides, b, batch, guidance, rescale, pixels, channels, tiles, BLOCK_P, BLOCK_C
        )
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        p, c = tile_start(index, channels, BLOCK_P, BLOCK_C)
        inside = tile_inside(p, c, pixels, channels, BLOCK_P, BLOCK_C)
        combined, _ = _guide(
            output, output_strides, b, batch, p, c, inside, guidance, GUIDED, BLOCK_P, BLOCK_C
        )
        at = tile_at(sample, sample_strides, b, p, c, BLOCK_P, BLOCK_C)
        x = tl.load(at, inside, other=0.0)
        clean = of_sample * x + of_output * (combined * factor)
        moved = keep * x + move * clean
        if previous is not None:
            at = tile_at(previous, previous_strides, b, p, c, BLOCK_P, BLOCK_C)
            moved += momentum * tl.load(at, inside, other=0.0)
        tl.store(tile_at(following, following_strides, b, p, c, BLOCK_P, BLOCK_C), moved, inside)
        tl.store(tile_at(denoised, denoised_strides, b, p, c, BLOCK_P, BLOCK_C), clean, inside)


@triton.jit
def _guide(
    output,
    strides,
    b,
    batch,
    p,
    c,
    inside,
    guidance,
    GUIDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The guided output of a tile, and the conditional one, float32."""
    first = tl.load(tile_at(output, strides, b, p, c, BLOCK_P, BLOCK_C), inside, other=0.0).to(tl.float32)
    if not GUIDED:
        return first, first
    at = tile_at(output, strides, b + batch, p, c, BLOCK_P, BLOCK_C)
    conditional = tl.load(at, inside, other=0.0).to(tl.float32)
    return first + guidance * (conditional - first), conditional


@triton.jit
def _rescale_factor(
    output,
    strides,
    b,
    batch,
    guidance,
    rescale,
    pixels,
    channels: tl.constexpr,
    tiles,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """rescale * std(conditional) / std(guided) + 1 - rescale, over the whole sample, as in arXiv 2305.08891, 3.4."""
    # sums of differences to a first value, so that a mean far from 0 costs no precision
    shift = tl.load(output + tl.cast(b + batch, tl.int64) * strides[0]).to(tl.float32)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares, guided_sums, guided_squares = sums, sums, sums
    for index in range(tiles):
        p, c = tile_start(index, channels, BLOCK_P, BLOCK_C)
        inside = tile_inside(p, c, pixels, channels, BLOCK_P, BLOCK_C)
        guided, conditional = _guide(
            output, strides, b, batch, p, c, inside, guidance, True, BLOCK_P, BLOCK_C
        )
        d, g = tl.where(inside, conditional - shift, 0.0), tl.where(inside, guided - shift, 0.0)
        sums += d
        squares += d * d
        guided_sums += g
        guided_squares += g * g
    count = pixels * channels
    total, guided_total = tl.sum(sums), tl.sum(guided_sums)
    spread = tl.sum(squares) - total * total / count
    guided_spread = tl.sum(guided_squares) - guided_total * guided_total / count
    return rescale * tl.sqrt(spread / guided_spread) + 1 - rescale


@launch.on_device
def guidance_step_fwd(
    sample: Tensor, output: Tensor, coefficients: Tensor, previous: Tensor | None, rescale: float
) -> tuple[Tensor, Tensor]:
    """Return the next sample and the denoised one, both float32 in the sample's memory format."""
    batch, channels = sample.shape[:2]
    pixels = sample.shape[2] * sample.shape[3]
    following, denoised = launch.empty_pixels_like(sample), launch.empty_pixels_like(sample)
    tensors = [
        launch.as_pixels(t) if t is not None else (None, None)
        for t in (sample, output, previous, following, denoised)
    ]
    strides = [s and launch.constant_strides(s) for _, s in tensors]
    guided = output.shape[0] == 2 * batch
    rescaled = guided and rescale != 0
    # With rescaling one program walks the whole sample: twice the loads in flight, from as many threads. At 8 warps
    # ptxas keeps to 64 registers and spills on sm_100.
    sizes = launch.tile(pixels, channels, tensors[0][1], sample.itemsize, elements=2048 if rescaled else 1024)
    sizes["num_warps"] = min(4, sizes["num_warps"])
    tiles = launch.count_tiles(pixels, channels, sizes)
    _guidance_step_kernel[1 if rescaled else tiles, batch](
        *(t for t, _ in tensors[:3]), coefficients.contiguous(), following, denoised, rescale, pixels, channels,
        *strides, GUIDED=guided, RESCALE=rescaled, **sizes
    )  # fmt: skip
    return following, denoised


guidance_step_op = torch.library.custom_op("localcontrol::guidance_step", guidance_step_fwd, mutates_args=())


@guidance_step_op.register_fake
def _(sample, output, coefficients, previous, rescale):
    return launch.empty_pixels_like(sample), launch.empty_pixels_like(sample)


def guidance_step(
    sample: Tensor,
    output: Tensor,
    coefficients: Tensor,
    previous: Tensor | None = None,
    *,
    rescale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`reference.guidance_step` as one kernel. No gradients."""
    checks.check_guidance_step(sample, output, coefficients, previous)
    if sample.numel() == 0:
        return sample.clone(), sample.clone()
    return launch.call(
        guidance_step_fwd, guidance_step_op, sample, output, coefficients, previous, float(rescale)
    )
