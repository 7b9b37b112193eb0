"""What is done to a traced graph: folded, its weights stored as they are used, its ports named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer, rewriter

import kernels
from export.graphs import Component

HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def clean(model: ir.Model, parameters: set[str]) -> None:
    """Do all of the below but naming the ports. parameters: the names of the weights."""
    simplify(model, parameters)
    transpose_weights(model)
    settle_reshapes(model)
    narrow_adds(model)
    widen_resizes(model)


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


def narrow_adds(model: ir.Model) -> None:
    """Add in half precision what is cast to float32, added and cast back.

    The value is the same: float32 has more than twice the bits of a half, so that rounding twice is rounding once. The
    control is added so in PyTorch, where the sum may have several terms.
    """
    for node in list(model.graph):
        if node.op_type != "Add":
            continue
        casts = [x.producer() for x in node.inputs]
        if not all(cast is not None and cast.op_type == "Cast" for cast in casts):
            continue
        halves, wide = [cast.inputs[0] for cast in casts], node.outputs[0]
        back = [use.node for use in wide.uses()]
        kinds = {x.dtype for x in halves} | {use.outputs[0].dtype for use in back if use.op_type == "Cast"}
        if any(use.outputs[0].is_graph_output() for use in back):
            continue
        if len(kinds) > 1 or not kinds <= HALVES or any(use.op_type != "Cast" for use in back) or not back:
            continue
        narrow = ir.node("Add", halves)
        narrow.outputs[0].dtype, narrow.outputs[0].shape = halves[0].dtype, wide.shape
        model.graph.insert_before(node, narrow)
        for use in back:
            use.outputs[0].replace_all_uses_with(narrow.outputs[0])
    passes.RemoveUnusedNodesPass()(model)


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


def release(values: Iterable[ir.Value]) -> None:
    """Let go of the weights: onnxscript's rules, as long-lived as the process, keep the graph they matched last."""
    for value in values:
        value.const_value = None
