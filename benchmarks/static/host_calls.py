"""The kernels' host functions at SDXL's real shapes (an image of 1024 x 1024), for what is counted without a GPU.

On the "meta" device the tensors take no memory: enough to compile what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import checks
from kernels.float8_rows import float8_rows_fwd
from kernels.geglu import geglu_bwd, geglu_float8_fwd, geglu_fwd
from kernels.group_norm_gradient import group_norm_silu_bwd
from kernels.group_norm_silu import group_norm_silu_fwd
from kernels.guidance_step import guidance_step_fwd
from kernels.inject import inject_bwd, inject_fwd
from kernels.layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from kernels.sobel_z0_loss import z0_losses_bwd, z0_losses_fwd

LATENT_EDGE = 128
FLOAT8_ARCH = 89
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True)
class Shapes:
    inject: Sequence[tuple[int, int]]  # channels, edge
    norm: Sequence[tuple[int, int]]
    geglu: Sequence[tuple[int, int]]  # rows, channels out
    edges: Sequence[str] = ("sobel",)


NORM = ((320, 128), (960, 64), (1280, 32))
REAL = Shapes(((320, 64), (640, 64), (1280, 32)), NORM, ((8192, 2560), (2048, 5120)), checks.EDGES)
FIRST = Shapes(REAL.inject[:1], REAL.norm[:1], REAL.geglu[:1])
FEW_TILES = Shapes(
    ((320, 16),), NORM, ((128, 2560),)
)  # a share of bytes is the same for few tiles and for many
FIRST_FEW_TILES = Shapes(FEW_TILES.inject, NORM[:1], FEW_TILES.geglu)


@dataclass(frozen=True)
class Call:
    """One way of one op at one shape. What `run` allocates for itself is not among its outputs."""

    op: str
    variant: str
    way: str  # "forward" or "backward"
    shape: str
    inputs: dict[str, object]  # the op's arguments, and `grad` on the way back
    run: Callable[[], tuple[Tensor, ...]]  # -> outputs


@dataclass(frozen=True)
class Maker:
    """Makes tensors of one device, dtype and memory format; all ones, so that interpreted kernels divide by none."""

    device: str
    dtype: torch.dtype
    layout: str

    def image(self, rows: int, channels: int, edge: int) -> Tensor:
        return self.ones(rows, channels, edge, edge).contiguous(memory_format=LAYOUTS[self.layout])

    def ones(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.ones(shape, dtype=dtype or self.dtype, device=self.device)


def calls(device: str, dtype: torch.dtype, layout: str, shapes: Shapes = REAL) -> Iterator[Call]:
    """Yield every host function at these shapes; latents are always those of 1024 x 1024 pixels."""
    make = Maker(device, dtype, layout)
    for channels, edge in shapes.inject:
        yield from inject_calls(make, channels, edge)
    for edges in shapes.edges:
        for noise in (False, True):
            yield from loss_calls(make, edges, noise)
    for channels, edge in shapes.norm:
        yield from norm_calls(make, channels, edge)
    yield from guidance_calls(make)
    if layout == "nhwc":  # rows and channels only: there is one layout
        for rows, channels in shapes.geglu:
            yield from geglu_calls(make, rows, channels)
            yield from layer_norm_calls(make, rows, channels // 4)
            yield from float8_calls(make, rows, channels)


def traffic_name(op: str, variant: str, way: str, dtype: str, layout: str, shape: str) -> str:
    """Return the name under which these calls' traffic is counted: once for all shapes but the norm's, whose chunks
    depend on them, and of the loss with Sobel's filter, which no other exceeds.
    """
    parts = [op, "" if op.endswith("loss") else variant, way, dtype, layout]
    return " ".join(filter(None, [*parts, shape if op == "group_norm_silu" else ""]))


def inject_calls(make: Maker, channels: int, edge: int, regions: int = 2) -> Iterator[Call]:
    """Sampling: two guidance halves share a feature row. Training: a batch of two images."""
    hidden, scales = make.image(2, channels, edge), make.ones(regions, dtype=torch.float32)
    for variant, batch in (("guidance", 1), ("training", 2)):
        features = [make.image(batch, channels, edge) for _ in range(regions)]
        masks = [make.ones(batch, 1, edge, edge, dtype=torch.float32) for _ in range(regions)]

        def forward(features=features, masks=masks):
            out = torch.empty_like(hidden)
            inject_fwd(hidden, features, masks, scales, out)
            return (out,)

        inputs = {"hidden": hidden, "features": features, "masks": masks, "scales": scales}
        yield Call("inject", variant, "forward", _shape(hidden), inputs, forward)
    grad = torch.ones_like(hidden)
    inputs = {"grad": grad, "masks": masks, "scales": scales}  # the features' values are not needed
    run = lambda: tuple(inject_bwd(grad, features, masks, scales))  # noqa: E731
    yield Call("inject", "training", "backward", _shape(hidden), inputs, run)


def loss_calls(make: Maker, edges: str, noise: bool, side: int = LATENT_EDGE) -> Iterator[Call]:
    """Return the calls for one image, samples being programs apart, and for epsilon, the prediction that reads most."""
    names = ("model_output", "noisy", "latents")
    inputs = {name: make.image(1, 4, side) for name in names}
    inputs["mask"] = make.ones(1, 1, side, side)
    inputs |= {name: make.ones(1, dtype=torch.float32) for name in ("alpha", "sigma")}
    op, shape = "noise_and_z0_loss" if noise else "sobel_z0_loss", _shape(inputs["latents"])
    grad = make.ones(1 + noise, 1, dtype=torch.float32)
    rest = *inputs.values(), "epsilon", edges, noise
    yield Call(op, edges, "forward", shape, inputs, lambda: (z0_losses_fwd(*rest),))
    yield Call(op, edges, "backward", shape, inputs | {"grad": grad}, lambda: (z0_losses_bwd(grad, *rest),))


def norm_calls(make: Maker, channels: int, edge: int, groups: int = 32) -> Iterator[Call]:
    """Yield the way back for the image alone, as where an adapter is trained, and for weight and bias too."""
    x, grad = make.image(2, channels, edge), make.image(2, channels, edge)
    weight, bias, rows = make.ones(channels), make.ones(channels), make.ones(2, channels)
    statistics = make.ones(2, 2, groups, dtype=torch.float32)
    for variant, offset, ways in (("", None, ("", "with parameters")), ("offset", rows, ("offset",))):
        inputs = {"x": x, "weight": weight, "bias": bias, "num_groups": groups, "offset": offset}

        def forward(offset=offset):
            return group_norm_silu_fwd(x, weight, bias, groups, 1e-5, True, offset)[:1]

        yield Call("group_norm_silu", variant, "forward", _shape(x), inputs, forward)
        for way in ways:

            def backward(offset=offset, parameters=way == "with parameters"):
                return group_norm_silu_bwd(grad, x, weight, bias, statistics, True, parameters, offset)

            yield Call("group_norm_silu", way, "backward", _shape(x), inputs | {"grad": grad}, backward)


def guidance_calls(make: Maker) -> Iterator[Call]:
    float32 = Maker(make.device, torch.float32, make.layout)
    sample, previous = (float32.image(1, 4, LATENT_EDGE) for _ in range(2))
    for variant, rows, rescale in (("guided", 2, 0.0), ("guided, rescaled", 2, 0.7), ("plain", 1, 0.0)):
        inputs = {"sample": sample, "output": make.image(rows, 4, LATENT_EDGE)}
        inputs |= {"coefficients": float32.ones(6), "previous": previous, "rescale": rescale}
        run = lambda args=inputs: guidance_step_fwd(*args.values())  # noqa: E731
        yield Call("guidance_step", variant, "forward", _shape(sample), inputs, run)


def geglu_calls(make: Maker, rows: int, channels: int) -> Iterator[Call]:
    x, bias, grad = make.ones(rows, 2 * channels), make.ones(2 * channels), make.ones(rows, channels)
    inputs = {"x": x, "bias": bias}
    float8 = {"x": x, "float8": True}  # as in a picture, where the layer before adds the bias
    yield Call("geglu", "float8", "forward", _shape(x), float8, lambda: geglu_float8_fwd(x, None))
    yield Call("geglu", "", "forward", _shape(x), inputs, lambda: (geglu_fwd(x, bias),))
    yield Call(
        "geglu", "", "backward", _shape(x), inputs | {"grad": grad}, lambda: (geglu_bwd(grad, x, bias),)
    )


def layer_norm_calls(make: Maker, rows: int, channels: int) -> Iterator[Call]:
    x, residual, grad = (make.ones(rows, channels) for _ in range(3))
    inputs = {"x": x, "residual": residual, "weight": make.ones(channels), "bias": make.ones(channels)}
    for variant, float8 in (("float8", True), ("", False)):
        run = lambda float8=float8: add_layer_norm_fwd(*inputs.values(), 1e-5, float8)  # noqa: E731
        yield Call("add_layer_norm", variant, "forward", _shape(x), inputs | {"float8": float8}, run)
    back = {"x": x, "weight": inputs["weight"], "grad_total": residual, "grad": grad}
    run = lambda: (add_layer_norm_bwd(x, inputs["weight"], residual, grad, 1e-5),)  # noqa: E731
    yield Call("add_layer_norm", "", "backward", _shape(x), back, run)


def float8_calls(make: Maker, rows: int, channels: int) -> Iterator[Call]:
    x = make.ones(rows, channels)
    yield Call("float8_rows", "", "forward", _shape(x), {"x": x}, lambda: float8_rows_fwd(x))


def runs_on(arch: int, op: str, variant: str) -> bool:
    """Return whether GPUs of that architecture have what a call needs."""
    return arch >= FLOAT8_ARCH or "float8" not in (variant, op.partition("_")[0])


def tensors_of(values) -> list[Tensor]:
    """Return all tensors among these arguments, in lists or not."""
    found = []
    for value in values:
        found += tensors_of(value) if isinstance(value, (list, tuple)) else [value]
    return [value for value in found if isinstance(value, Tensor)]


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))
