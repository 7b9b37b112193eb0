"""Every op in plain torch: the specification, the CPU path, the ONNX path and the tests' oracle.

Sums are accumulated in float32 (float64 for float64 input) and rounded once to the output's dtype.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import checks

FLOAT8 = torch.float8_e4m3fn
FLOAT8_LARGEST = torch.finfo(FLOAT8).max
FLOAT8_SMALLEST = 1e-12  # a row's largest value at least: of zeros there is no scale
SOBEL_EPS = 1e-6  # kornia.filters.sobel's; keeps the square root differentiable on flat areas


class Float8Rows(NamedTuple):
    """Rows in float8: values * scales is what they stand for."""

    values: Tensor  # (..., C) float8 e4m3
    scales: Tensor  # (..., 1) float32


def inject(
    hidden: Tensor,
    features: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    scales: Tensor,
    *,
    inplace: bool = False,
) -> Tensor:
    """hidden + sum over regions r of scales[r] * masks[r] * features[r].

    hidden: (G*B, C, H, W), any float dtype and memory format; row i takes feature row i % B, so the G
        guidance halves share the features without a copy.
    features: R tensors (B or 1, C, H, W).
    masks: R tensors (B or 1, 1, H, W) in [0, 1], each of them or the whole argument None for "everywhere".
    scales: (R,) float32.
    inplace: write the sum into `hidden` and return it.

    Returns hidden's shape, dtype and memory format. Differentiable in hidden and features.
    Raises ValueError where the shapes or dtypes do not fit.
    """
    masks = [None] * len(features) if masks is None else masks
    batch = checks.check_inject(hidden, features, masks, scales)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    terms = []
    for r, (feature, mask) in enumerate(zip(features, masks, strict=True)):
        gate = scales[r].to(dtype) if mask is None else mask.to(dtype) * scales[r].to(dtype)
        terms.append(feature.to(dtype) * gate)
    out = hidden if inplace else hidden.clone()
    if terms:
        # (G, B, C, H, W), a view; not where each row has its own, or all the same. len() would fix a graph's batch.
        halves = out if batch in (1, out.shape[0]) else out.unflatten(0, (-1, batch))
        halves.add_(sum(terms[1:], terms[0]))  # summed in the wider dtype, rounded as it is stored
    return out


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
    """mean over (C, h, w) of (S(z0_hat) M - S(z0) M)^2 for each sample, S the Sobel magnitude.

    model_output, noisy (z_t), latents (z0): (B, C, h, w), any h, w >= 1.
    mask M: (B or 1, 1, h, w). alpha, sigma: (B,), with z_t = alpha z0 + sigma eps.
    edges: what S is, "sobel", "laplacian" or "none" (the latent itself).
    Returns (B,) float32 (float64 for float64 input). Differentiable in model_output. Unweighted.
    Raises ValueError where the shapes do not fit or a name is unknown.
    """
    checks.check_loss(model_output, noisy, latents, mask, alpha, sigma, prediction_type, edges)
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    model_output, noisy, latents, mask = (t.to(dtype) for t in (model_output, noisy, latents, mask))
    predicted = predict_z0(model_output, noisy, alpha.to(dtype), sigma.to(dtype), prediction_type)
    find = {"sobel": sobel, "laplacian": laplacian, "none": lambda z: z}[edges]
    difference = find(predicted) * mask - find(latents) * mask
    return difference.square().mean(dim=(1, 2, 3))


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
    """Return the two terms of the training loss, (B,) each: mean((o - target)^2), and `sobel_z0_loss` of the same
    arguments.

    The target is what noisy and latents imply: eps = (z_t - alpha z0) / sigma, v = alpha eps - sigma z0, or z0.
    sigma must not be 0 for the first two.
    """
    z0_loss = sobel_z0_loss(model_output, noisy, latents, mask, alpha, sigma, prediction_type, edges=edges)
    dtype = z0_loss.dtype
    target, a, s = (
        latents.to(dtype),
        alpha.to(dtype)[:, None, None, None],
        sigma.to(dtype)[:, None, None, None],
    )
    if prediction_type != "sample":
        noise = (noisy.to(dtype) - a * target) / s
        target = noise if prediction_type == "epsilon" else a * noise - s * target
    return (model_output.to(dtype) - target).square().mean(dim=(1, 2, 3)), z0_loss


def predict_z0(
    model_output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """Return the clean latent implied by a model's output: z0_hat, (B, C, h, w).

    model_output, noisy: (B, C, h, w); alpha, sigma: (B,). With z_t = alpha z0 + sigma eps:
    epsilon (z_t - sigma o) / alpha, v_prediction alpha z_t - sigma o, sample o.
    """
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    if prediction_type == "epsilon":
        return (noisy - sigma * model_output) / alpha
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * model_output
    return model_output


def sobel(z: Tensor) -> Tensor:
    """Sobel gradient magnitude of each channel, (B, C, h, w) -> (B, C, h, w).

    kornia.filters.sobel's convention: kernel [[-1,0,1],[-2,0,2],[-1,0,1]] / 8 and its transpose, replicate
    padding, sqrt(gx^2 + gy^2 + 1e-6). The kernel is separable: [1,2,1] across, [-1,0,1] along.
    """
    z = F.pad(z, (1, 1, 1, 1), mode="replicate")
    rows = z[..., :-2, :] + 2 * z[..., 1:-1, :] + z[..., 2:, :]
    columns = z[..., :-2] + 2 * z[..., 1:-1] + z[..., 2:]
    gx = (rows[..., 2:] - rows[..., :-2]) / 8
    gy = (columns[..., 2:, :] - columns[..., :-2, :]) / 8
    return (gx.square() + gy.square() + SOBEL_EPS).sqrt()


def laplacian(z: Tensor) -> Tensor:
    """Sum of each pixel's 3 x 3 neighbourhood minus nine times the pixel, over 16; replicate padding.

    kornia.filters.laplacian's kernel of size 3, normalized: ones around -8.
    """
    padded = F.pad(z, (1, 1, 1, 1), mode="replicate")
    across = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
    return sum(across[..., i : i + z.shape[-2], :] - 3 * z for i in range(3)) / 16  # 0 where all is flat


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
    """silu(group_norm(x + offset)), or the norm alone: (B, C, H, W) -> (B, C, H, W), memory format kept.

    weight, bias: (C,). offset: (B or 1, C), added to every pixel, or None. Statistics over each sample's
    C / num_groups channels and all pixels, variance biased. Differentiable in all of them; the kernels, in all but
    offset. Raises ValueError where the shapes do not fit.
    """
    checks.check_group_norm(x, weight, bias, num_groups, offset)
    if offset is not None:
        x = x + offset[:, :, None, None].to(x.dtype)
    y = F.group_norm(x, num_groups, weight, bias, eps)  # float32 inside
    return F.silu(y) if silu else y


def geglu(x: Tensor, bias: Tensor | None = None, *, float8: bool = False) -> Tensor | Float8Rows:
    """value * gelu(gate), the halves of the last dimension of x + bias: (..., 2 C) -> (..., C); exact gelu.

    bias: (2 C,) or None. float8: return `float8_rows` of what it is in float32, without gradients. Else differentiable
    in x and bias. Raises ValueError where the shapes do not fit.
    """
    checks.check_geglu(x, bias)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    value, gate = (wide if bias is None else wide + bias).chunk(2, dim=-1)
    gated = value * F.gelu(gate)
    return float8_rows(gated) if float8 else gated.to(x.dtype)


def float8_rows(x: Tensor) -> Float8Rows:
    """Return (..., C) in float8 e4m3, each row scaled so that its largest value is that format's, 448.

    What a product in float8 takes. Raises ValueError where x is no such tensor.
    """
    checks.check_float8_rows(x)
    scales = x.abs().amax(-1, keepdim=True).float().clamp_min(FLOAT8_SMALLEST) / FLOAT8_LARGEST
    return Float8Rows((x / scales).to(FLOAT8), scales)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    float8: bool = False,
) -> tuple[Tensor, Tensor | Float8Rows]:
    """Return x + residual, in x's dtype, and its layer normalisation over the last dimension, (..., C) each.

    residual: as x, or None for none: the sum is then x itself. weight, bias: (C,). float8: return the norm as
    `float8_rows` of what it is in float32. A transformer block normalises each sum that it makes: the two together read
    and write it once. Differentiable in all of them; the kernels, in x and residual. Raises ValueError where shapes do
    not fit.
    """
    checks.check_layer_norm(x, residual, weight, bias)
    total = x if residual is None else x + residual
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = F.layer_norm(total.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return total, float8_rows(norm) if float8 else norm.to(x.dtype)


def guidance_step(
    sample: Tensor,
    output: Tensor,
    coefficients: Tensor,
    previous: Tensor | None = None,
    *,
    rescale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return one step of a linear sampler from the model's output: the next sample, and the denoised one it is made
    with.

        o = unguided + w (guided - unguided)        where output has 2B rows, the unguided first; otherwise output
        o = o (rescale std(guided) / std(o) + 1 - rescale)      std over each sample, arXiv 2305.08891 section 3.4
        denoised = p sample + q o
        next = a sample + b denoised + c previous

    sample: (B, C, h, w) float32. output: (B or 2B, C, h, w), any float dtype.
    coefficients: (6,) float32: w, p, q, a, b, c. Euler has c = 0; DPM++ 2M uses the previous step's denoised.
    previous: (B, C, h, w) float32, or None for none. Returns two float32 (B, C, h, w) in the sample's memory format.
    Raises ValueError where the shapes or dtypes do not fit.
    """
    checks.check_guidance_step(sample, output, coefficients, previous)
    w, p, q, a, b, c = coefficients.to(sample.dtype)
    output = output.to(sample.dtype)
    if len(output) == 2 * len(sample):
        output = guide(output, w, rescale)
    denoised = p * sample + q * output
    following = a * sample + b * denoised
    return (following if previous is None else following + c * previous), denoised


def guide(output: Tensor, guidance: float | Tensor, rescale: float = 0.0) -> Tensor:
    """Return (B, C, h, w) of a guidance batch (2B, C, h, w), the unguided rows first; see `guidance_step`."""
    unguided, guided = output.chunk(2)
    output = unguided + guidance * (guided - unguided)
    if rescale == 0:
        return output
    spread, guided_spread = (t.std(dim=(1, 2, 3), keepdim=True) for t in (output, guided))
    return output * (rescale * guided_spread / spread + 1 - rescale)
