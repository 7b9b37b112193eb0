"""Group and layer normalisation below float32 as OpenVINO's CPU plugin computes them fastest.

ONNX casts around a normalisation, so that its statistics are taken in float32. The plugin takes those of MVN in float32
whatever type comes in, but computes every cast as a pass over memory, and a group norm's scale and shift along rows as
short as the picture is wide. Without casts, and over whole channels, a step of the embedded UNet in bf16 takes 0.86
times as long (two cores, 1 and 8 pictures of 128 x 128); float32 has no casts and gains nothing.
With its input transposed by the graph it does (eight pictures of the embedded model take 0.91 times as long: up to 64
channels the plugin reorders NHWC in a slow loop), but 2026.4 then computes wrong values at 80 x 32 pixels.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as op


def rewrite_norms(model: ov.Model) -> None:
    """Replace the normalisations that stand between casts, in place; names of constants stay."""
    replace = {"GroupNormalization": replace_group_norm, "MVN": replace_mvn}
    for node in model.get_ordered_ops():
        last = cast_back(node) if node.get_type_name() in replace else None
        if last is not None and is_cast(node.input_value(0)):
            replace[node.get_type_name()](node, last)
    model.validate_nodes_and_infer_types()


def replace_mvn(node: ov.Node, last: ov.Node) -> None:
    """Return the parts of a layer norm, which scales and shifts after `last`, the cast back."""
    data, axes, eps = uncast(node.input_value(0)), node.input_value(1), node.get_attributes()["eps"]
    put(op.mvn(data, axes, True, eps, "inside_sqrt"), last)


def replace_group_norm(node: ov.Node, last: ov.Node) -> None:
    """GroupNormalization of (N, C, h, w), and the SiLU after `last` if there is one, over (N, C, h*w)."""
    data, scale, shift = (uncast(node.input_value(i)) for i in range(3))
    channels = node.get_output_partial_shape(0)[1].get_length()
    groups, eps = node.get_attributes()["num_groups"], node.get_attributes()["epsilon"]
    shape = op.shape_of(data)
    rows = op.gather(shape, np.array([0]), np.array(0))
    normal = op.mvn(reshape(data, rows, groups, -1), np.array([2]), True, eps, "inside_sqrt")
    scale, shift = (op.reshape(x, np.array([channels, 1]), False) for x in (scale, shift))
    result = op.add(op.multiply(reshape(normal, rows, channels, -1), scale), shift)
    if (silu := silu_of(last)) is not None:
        last, result = silu, op.multiply(result, op.sigmoid(result))
    put(op.reshape(result, shape, False), last)


def reshape(data: ov.Output | ov.Node, rows: ov.Node, *rest: int) -> ov.Node:
    return op.reshape(data, op.concat([rows, op.constant(np.array(rest))], 0), False)


def is_cast(value: ov.Output) -> bool:
    return value.get_node().get_type_name() == "Convert"


def uncast(value: ov.Output) -> ov.Output:
    return value.get_node().input_value(0) if is_cast(value) else value


def cast_back(node: ov.Node) -> ov.Node | None:
    """Return the cast that is the only reader of `node`."""
    found = readers(node)
    return found[0] if [x.get_type_name() for x in found] in (["Convert"], ["ConvertLike"]) else None


def silu_of(node: ov.Node) -> ov.Node | None:
    """Return the product of `node` and its sigmoid, where nothing else reads it."""
    found = {reader.get_type_name(): reader for reader in readers(node)}
    if set(found) != {"Sigmoid", "Multiply"} or readers(found["Sigmoid"]) != [found["Multiply"]]:
        return None
    return found["Multiply"]


def readers(node: ov.Node) -> list[ov.Node]:
    return [target.get_node() for target in node.output(0).get_target_inputs()]


def put(new: ov.Node, old: ov.Node) -> None:
    """Have those that read `old` read `new`, which takes its name."""
    new.set_friendly_name(old.get_friendly_name())
    old.output(0).replace(new.output(0))
