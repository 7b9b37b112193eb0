"""What the ops' arguments must be, said in one line where they are not: the same for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
EDGES = ("sobel", "laplacian", "none")


def check_inject(
    hidden: Tensor, features: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor
) -> int:
    """Return the feature batch B, once every shape and dtype has been found to fit."""
    if hidden.ndim != 4 or not hidden.is_floating_point():
        raise ValueError(f"inject: hidden must be a float (G*B, C, H, W), got {_describe(hidden)}")
    regions = len(features)
    if len(masks) != regions:
        raise ValueError(f"inject: {regions} features need as many masks, got {len(masks)}")
    if scales.shape != (regions,) or not scales.is_floating_point():
        raise ValueError(
            f"inject: scales must be a float ({regions},), one a region, got {_describe(scales)}"
        )
    tensors = [t for t in (*features, *masks) if t is not None and t.ndim]
    # no max() and no text of a number here: either would tie a compiled graph to one batch size
    batch = next((t.shape[0] for t in tensors if t.shape[0] != 1), 1)
    if batch == 0 or hidden.shape[0] % batch:
        raise ValueError(
            f"inject: hidden's batch {hidden.shape[0]} is not a multiple of the features' batch {batch}"
        )
    channels, size = hidden.shape[1], hidden.shape[2:]
    for r, feature in enumerate(features):
        _check_rows(f"features[{r}]", feature, batch, (channels, *size))
        if masks[r] is not None:
            _check_rows(f"masks[{r}]", masks[r], batch, (1, *size))
    return batch


def _check_rows(name: str, tensor: Tensor, batch: int, row: tuple[int, ...]) -> None:
    fits = tensor.ndim == 4 and tensor.shape[0] in (1, batch) and tuple(tensor.shape[1:]) == row
    if not fits or not tensor.is_floating_point():
        rows = "1" if batch == 1 else f"{batch} or 1"
        raise ValueError(
            f"inject: {name} must be a float ({rows}, {', '.join(map(str, row))}), got {_describe(tensor)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_loss(
    model_output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    mask: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    edges: str,
) -> None:
    for name, value, known in (
        ("prediction_type", prediction_type, PREDICTION_TYPES),
        ("edges", edges, EDGES),
    ):
        if value not in known:
            raise ValueError(
                f"{name} must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}, got {value!r}"
            )
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


def check_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, offset: Tensor | None = None
) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"group_norm_silu: x must be a float (B, C, H, W), got {_describe(x)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm_silu: num_groups must divide the {channels} channels, got {num_groups}")
    if x.numel() == num_groups:
        raise ValueError(f"group_norm_silu: a group must have more than one value, got x {tuple(x.shape)}")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor.shape != (channels,) or not tensor.is_floating_point():
            raise ValueError(
                f"group_norm_silu: {name} must be a float ({channels},), got {_describe(tensor)}"
            )
    if offset is not None:
        shapes = (1, channels), (len(x), channels)
        if offset.shape not in shapes or not offset.is_floating_point():
            expected = f"({'1' if len(x) == 1 else f'{len(x)} or 1'}, {channels})"
            raise ValueError(f"group_norm_silu: offset must be a float {expected}, got {_describe(offset)}")


def check_geglu(x: Tensor, bias: Tensor | None) -> None:
    if not x.ndim or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"geglu: x must be a float (..., 2 C), got {_describe(x)}")
    if bias is not None and (bias.shape != x.shape[-1:] or not bias.is_floating_point()):
        raise ValueError(f"geglu: bias must be a float ({x.shape[-1]},), got {_describe(bias)}")


def check_float8_rows(x: Tensor) -> None:
    if not x.ndim or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"float8_rows: x must be a float (..., C), got {_describe(x)}")


def check_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    if not x.ndim or not x.is_floating_point():
        raise ValueError(f"add_layer_norm: x must be a float (..., C), got {_describe(x)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"add_layer_norm: residual must be as x, {_describe(x)}, got {_describe(residual)}")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor.shape != x.shape[-1:] or not tensor.is_floating_point():
            raise ValueError(
                f"add_layer_norm: {name} must be a float ({x.shape[-1]},), got {_describe(tensor)}"
            )


def check_guidance_step(
    sample: Tensor, output: Tensor, coefficients: Tensor, previous: Tensor | None
) -> None:
    if sample.ndim != 4 or sample.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"guidance_step: sample must be a float32 (B, C, h, w), got {_describe(sample)}")
    batch, *row = sample.shape
    fits = output.shape in (sample.shape, (2 * batch, *row)) and output.is_floating_point()
    if not fits:
        raise ValueError(
            f"guidance_step: output must be a float {tuple(sample.shape)}, or with twice the rows, got "
            f"{_describe(output)}"
        )
    if previous is not None and (previous.shape != sample.shape or previous.dtype != sample.dtype):
        raise ValueError(
            f"guidance_step: previous must be as sample, {_describe(sample)}, got {_describe(previous)}"
        )
    if coefficients.shape != (6,) or not coefficients.is_floating_point():
        raise ValueError(f"guidance_step: coefficients must be a float (6,), got {_describe(coefficients)}")
