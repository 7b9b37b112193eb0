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
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset21 as op
from onnxscript import optimizer, rewriter

import kernels
from export.graphs import Component
from kernels import ops
from runtime.engines.ports import KEY, LEVEL, MASK, VALUE, Axis, Port, Profile

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


def release(values: Iterable[ir.Value]) -> None:
    """Let go of the weights: onnxscript's rules, as long-lived as the process, keep the graph they matched last."""
    for value in values:
        value.const_value = None


def trace(component: Component, profile: Profile) -> torch.export.ExportedProgram:
    """torch.export's graph, dynamic where the profile is."""
    arguments = tuple(_example(port, profile) for port in component.inputs)
    dynamic = [_dynamic(port, profile) for port in component.inputs]
    named = len([p for p in component.inputs if not p.name.startswith(VARIADIC)])
    shapes = (*dynamic[:named], tuple(dynamic[named:])) if named < len(dynamic) else tuple(dynamic)
    with torch.no_grad(), ops.use_backend("torch"), quiet():
        return torch.export.export(component.module.eval(), arguments, dynamic_shapes=shapes, strict=False)


VARIADIC = (KEY, VALUE, LEVEL, MASK)  # inputs that the graphs' modules take as *arguments


def to_onnx(component: Component, program: torch.export.ExportedProgram) -> ir.Model:
    """Return the program in ONNX, with the component's names, its weights still torch's own tensors."""
    table = {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.pixel_unshuffle.default: pixel_unshuffle,
    }
    with quiet():
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
    parameters = {name for name, _ in component.module.named_parameters()}
    simplify(model, parameters)
    transpose_weights(model)
    settle_reshapes(model)
    widen_resizes(model)
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


def simplify(model: ir.Model, parameters: set[str]) -> None:
    """Inline, fold constants, drop what is unused. No weight is touched, so that each keeps its name."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(x is not None and x.name in parameters for x in node.inputs) else None

    passes.InlinePass()(model)
    for _ in range(2):  # the second round folds what the first one's rewriting uncovered
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        rewriter.rewrite(model)
        passes.RemoveUnusedNodesPass()(model)
    for step in (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        step(model)


def transpose_weights(model: ir.Model) -> None:
    """Store the weight of a linear layer's MatMul transposed, instead of transposing at every call."""
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name not in graph.initializers or weight.const_value is None:
            continue
        tensor, order = weight.const_value, list(node.attributes["perm"].as_ints())
        if order != [1, 0]:
            continue
        lazy = ir.LazyTensor(
            lambda tensor=tensor: ir.tensor(tensor.numpy().T.copy(), dtype=tensor.dtype),
            dtype=tensor.dtype,
            shape=ir.Shape([tensor.shape[1], tensor.shape[0]]),
            name=f"{weight.name}.T",
        )
        stored = ir.val(lazy.name, tensor.dtype, lazy.shape, const_value=lazy)
        graph.register_initializer(stored)
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)
        if not weight.uses():
            release([weight])
    passes.RemoveUnusedNodesPass()(model)


def widen_resizes(model: ir.Model) -> None:
    """TensorRT has no Resize in bfloat16: the nearest neighbours of a float32 copy have the same values."""
    for node in list(model.graph):
        if node.op_type != "Resize" or node.inputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        wide = _cast(node.inputs[0], ir.DataType.FLOAT)
        model.graph.insert_before(node, wide)
        node.replace_input_with(0, wide.outputs[0])
        resized = node.outputs[0]
        narrow = _cast(resized, ir.DataType.BFLOAT16)
        resized.dtype = ir.DataType.FLOAT
        resized.replace_all_uses_with(narrow.outputs[0])
        narrow.replace_input_with(0, resized)
        model.graph.insert_after(node, narrow)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype})
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node


def settle_reshapes(model: ir.Model) -> None:
    """Constant targets for reshapes that keep dynamic dimensions in place, instead of a graph that computes them."""
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.inputs[1].const_value is not None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or after is None:
            continue
        target = [
            size if isinstance(size, int) else 0 if i < len(before) and _same(before[i], size) else -1
            for i, size in enumerate(after)
        ]
        if target.count(-1) <= 1:
            tensor = ir.tensor(target, dtype=ir.DataType.INT64, name=f"{node.outputs[0].name}_shape")
            shape = ir.val(tensor.name, tensor.dtype, tensor.shape, const_value=tensor)
            model.graph.register_initializer(shape)
            node.replace_input_with(1, shape)
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)  # a 0 is the input's size, not none
    passes.RemoveUnusedNodesPass()(model)


def _same(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    return a == b and (isinstance(a, int) or a.value is not None)


def name_ports(model: ir.Model, component: Component) -> None:
    """Put the component's names on inputs, outputs and dynamic dimensions."""
    graph, symbols = model.graph, {}
    for value, port in zip(graph.inputs, component.inputs, strict=True):
        value.name = port.name
        for found, size in zip(value.shape, port.shape, strict=True):
            if not isinstance(found, int):
                symbols[str(found.value)] = str(size)
    for value, port in zip(graph.outputs, component.outputs, strict=True):
        value.name = port.name
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_rename(size, symbols) for size in value.shape])
    graph.name = component.name
    model.producer_name, model.producer_version = "localcontrol", kernels.__version__


def _rename(size: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"\bs\d+\b", lambda match: symbols.get(match[0], match[0]), str(size.value))


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
def quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not used here."""
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
