"""A component as an ONNX file: traced by torch.export, cleaned up, checked, written with its weights beside it.

Opset 21: GroupNormalization is one node, which TensorRT fuses, and attention is still spelled MatMul, Softmax, MatMul,
the pattern that TensorRT fuses for any head width and version (23's Attention needs TensorRT 10.14, and fails where no
fused kernel fits). The kernels' ops are traced in plain torch. Weights keep the names of the parameters, so that they
can be exchanged later; a transposed one is called `<name>.T`. They are written one by one, never copied as a whole. (In
bfloat16 the files go beyond the standard, whose Conv takes it from opset 22 on: TensorRT and OpenVINO do not mind.)
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from export.graphs import Component
from export.onnx_passes import clean, name_ports, release
from kernels import ops
from runtime.engines.ports import KEY, LEVEL, MASK, SHARES, VALUE, Axis, Port, Profile

OPSET = 21
TRACED = {"rows": 2, "items": 2}  # of a dynamic batch: 1 would be taken for a constant
TRACED_PIXELS = (
    128  # the least that is traced: small sizes would be taken for constants at the coarsest level
)
SMALL = 256  # bytes: what stays in the .onnx file itself


def export_onnx(
    component: Component, profile: Profile, path: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write `path` and `path`.data. progress: called with (weights written, weights)."""
    program = trace(component, profile)
    model = to_onnx(component, program)
    del program

    def report(_, info) -> None:
        if progress is not None:
            progress(info.index + 1, info.total)

    ir.save(
        model,
        path,
        external_data=f"{path.name}.data",
        size_threshold_bytes=SMALL,
        callback=report,
        max_workers=2,
    )
    release(model.graph.initializers.values())
    onnx.checker.check_model(str(path))


def trace(component: Component, profile: Profile) -> torch.export.ExportedProgram:
    """torch.export's graph, dynamic where the profile is."""
    arguments = tuple(_example(port, profile) for port in component.inputs)
    dynamic = [_dynamic(port, profile) for port in component.inputs]
    named = len([p for p in component.inputs if not p.name.startswith(VARIADIC)])
    shapes = (*dynamic[:named], tuple(dynamic[named:])) if named < len(dynamic) else tuple(dynamic)
    with torch.no_grad(), ops.use_backend("torch"), silence():
        return torch.export.export(component.module.eval(), arguments, dynamic_shapes=shapes, strict=False)


VARIADIC = (KEY, VALUE, SHARES, LEVEL, MASK)  # inputs that the graphs' modules take as *arguments


def to_onnx(component: Component, program: torch.export.ExportedProgram) -> ir.Model:
    """Return the program in ONNX, with the component's names, its weights still torch's own tensors."""
    table = {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.pixel_unshuffle.default: pixel_unshuffle,
    }
    with silence():
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=table,
        )
    model = made.model
    clean(model, {name for name, _ in component.module.named_parameters()})
    name_ports(model, component)
    return model


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
):
    """softmax(scale q k^T + mask) v, spelled as TensorRT's documentation asks for its fused attention: the scale on q.

    q, k, v: (B, heads, S, C / heads). A causal mask is made of constants: S is static wherever one is used here.
    """
    width, dtype = query.shape[3], query.dtype
    scale = 1 / math.sqrt(width) if scale is None else scale
    scores = op.MatMul(
        op.Mul(query, _scalar(scale, dtype)),
        op.Transpose(key, perm=[0, 1, 3, 2]),
    )
    if is_causal:
        shape = query.shape[2], key.shape[2]
        mask = torch.full(shape, -torch.inf).triu(1)
        scores = op.Add(
            scores, op.Cast(op.Constant(value=onnx.numpy_helper.from_array(mask.numpy())), to=dtype)
        )
    elif attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            attn_mask = op.Where(attn_mask, _scalar(0.0, dtype), _scalar(-math.inf, dtype))
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def pixel_unshuffle(x, downscale_factor: int):
    """Write (B, C, H, W) -> (B, C r^2, H / r, W / r) as one SpaceToDepth, which orders its channels the other way
    round.
    """
    channels, area = x.shape[1], downscale_factor**2
    out = op.SpaceToDepth(x, blocksize=downscale_factor)
    if channels == 1:
        return out
    order = [offset * channels + channel for channel in range(channels) for offset in range(area)]
    return op.Gather(out, op.Constant(value_ints=order), axis=1)


def _scalar(value: float, dtype: ir.DataType):
    return op.Cast(op.Constant(value_float=value), to=dtype)


def _example(port: Port, profile: Profile) -> torch.Tensor:
    """Return a tensor of a shape that the profile allows, or a typical one where it is dynamic."""
    shape = [_traced(size, profile) if isinstance(size, Axis) else size for size in port.shape]
    return torch.zeros(shape, dtype=port.dtype)


def _traced(axis: Axis, profile: Profile) -> int:
    size = profile.range(axis.name)[1]
    if profile.is_dynamic(axis):
        size = TRACED.get(axis.name) or max(size, TRACED_PIXELS)
    return axis.of({axis.name: size})


def _dynamic(port: Port, profile: Profile) -> dict[int, object]:
    axes = [(i, size) for i, size in enumerate(port.shape) if isinstance(size, Axis)]
    return {i: torch.export.Dim.DYNAMIC for i, axis in axes if profile.is_dynamic(axis)}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the exporter from noting packages that are not used here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
