"""Every op in plain torch: the specification, the CPU path, the ONNX path and the tests' oracle.

Sums are accumulated in float32 (float64 for float64 input) and rounded once to the output's dtype.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SOBEL_EPS = 1e-6  # kornia.filters.sobel's; keeps the square root differentiable on flat areas


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
    batch = _check_inject(hidden, features, masks, scales)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    terms = []
    for r, (feature, mask) in enumerate(zip(features, masks, strict=True)):
        gate = scales[r].to(dtype) if mask is None else mask.to(dtype) * scales[r].to(dtype)
        terms.append(feature.to(dtype) * gate)
    out = hidden if inplace else hidden.clone()
    if terms:
        halves = out.unflatten(0, (-1, batch))  # (G, B, C, H, W), a view
        halves.add_(sum(terms[1:], terms[0]))  # summed in the wider dtype, rounded as it is stored
    return out


def _check_inject(
    hidden: Tensor, features: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor
) -> int:
    """The feature batch B, once every shape and dtype has been found to fit."""
    if hidden.ndim != 4 or not hidden.is_floating_point():
        raise ValueError(f"inject: hidden must be a float (G*B, C, H, W), got {_describe(hidden)}")
    regions = len(features)
    if len(masks) != regions:
        raise ValueError(f"inject: {regions} features need as many masks, got {len(masks)}")
    if scales.shape != (regions,) or not scales.is_floating_point():
        raise ValueError(
            f"inject: scales must be a float ({regions},), one a region, got {_describe(scales)}"
        )
    batch = max([t.shape[0] for t in (*features, *masks) if t is not None and t.ndim], default=1)
    if batch == 0 or hidden.shape[0] % batch:
        raise ValueError(
            f"inject: hidden's batch {hidden.shape[0]} is no multiple of the features' batch {batch}"
        )
    channels, size = hidden.shape[1], hidden.shape[2:]
    for r, feature in enumerate(features):
        _check_rows(f"features[{r}]", feature, batch, (channels, *size))
        if masks[r] is not None:
            _check_rows(f"masks[{r}]", masks[r], batch, (1, *size))
    return batch


def _check_rows(name: str, tensor: Tensor, batch: int, row: tuple[int, ...]) -> None:
    rows = "1" if batch == 1 else f"{batch} or 1"
    fits = tensor.ndim == 4 and tensor.shape[0] in (1, batch) and tuple(tensor.shape[1:]) == row
    if not fits or not tensor.is_floating_point():
        raise ValueError(
            f"inject: {name} must be a float ({rows}, {', '.join(map(str, row))}), got {_describe(tensor)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def sobel_z0_loss(
    model_output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    mask: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str = "epsilon",
) -> Tensor:
    """mean over (C, h, w) of (S(z0_hat) M - S(z0) M)^2 for each sample, S the Sobel magnitude.

    model_output, noisy (z_t), latents (z0): (B, C, h, w), any h, w >= 1.
    mask M: (B or 1, 1, h, w). alpha, sigma: (B,), with z_t = alpha z0 + sigma eps.
    Returns (B,) float32 (float64 for float64 input). Differentiable in model_output. Unweighted.
    Raises ValueError where the shapes do not fit or the prediction type is unknown.
    """
    _check_loss(model_output, noisy, latents, mask, alpha, sigma)
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    model_output, noisy, latents, mask = (t.to(dtype) for t in (model_output, noisy, latents, mask))
    predicted = predict_z0(model_output, noisy, alpha.to(dtype), sigma.to(dtype), prediction_type)
    difference = sobel(predicted) * mask - sobel(latents) * mask
    return difference.square().mean(dim=(1, 2, 3))


def _check_loss(
    model_output: Tensor, noisy: Tensor, latents: Tensor, mask: Tensor, alpha: Tensor, sigma: Tensor
):
    shape = model_output.shape
    if len(shape) != 4 or not model_output.is_floating_point():
        raise ValueError(
            f"sobel_z0_loss: model_output must be a float (B, C, h, w), got {_describe(model_output)}"
        )
    for name, tensor in {"noisy": noisy, "latents": latents}.items():
        if tensor.shape != shape:
            raise ValueError(
                f"sobel_z0_loss: {name} must be {tuple(shape)}, as model_output, got {_describe(tensor)}"
            )
    batch, _, height, width = shape
    if mask.shape not in ((batch, 1, height, width), (1, 1, height, width)):
        raise ValueError(
            f"sobel_z0_loss: mask must be ({batch} or 1, 1, {height}, {width}), got {_describe(mask)}"
        )
    for name, tensor in {"alpha": alpha, "sigma": sigma}.items():
        if tensor.shape != (batch,):
            raise ValueError(
                f"sobel_z0_loss: {name} must be ({batch},), one a sample, got {_describe(tensor)}"
            )


def predict_z0(
    model_output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """The clean latent implied by a model's output: z0_hat, (B, C, h, w).

    model_output, noisy: (B, C, h, w); alpha, sigma: (B,). With z_t = alpha z0 + sigma eps:
    epsilon (z_t - sigma o) / alpha, v_prediction alpha z_t - sigma o, sample o.
    """
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    if prediction_type == "epsilon":
        return (noisy - sigma * model_output) / alpha
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * model_output
    if prediction_type == "sample":
        return model_output
    raise ValueError(
        f"prediction_type must be 'epsilon', 'v_prediction' or 'sample', got {prediction_type!r}"
    )


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
