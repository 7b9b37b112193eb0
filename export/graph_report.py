"""What an exported graph is like: its size, and how much of it is in the forms that TensorRT fuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx


@dataclass(frozen=True)
class GraphReport:
    """Counts of one ONNX file.

    nodes: all of them. attention: of the `softmaxes`, how many stand between two MatMuls with the scale on their
    operands, the form that TensorRT's documentation asks for. normalisations: GroupNormalization, LayerNormalization
    and RMSNormalization nodes; other_normalisations: spelled with InstanceNormalization, which TensorRT fuses only in
    parts. casts: between floating-point types; stray_casts: those of them that are neither at an input, an output nor
    around a Resize.
    """

    nodes: int
    softmaxes: int
    attention: int
    normalisations: int
    other_normalisations: int
    casts: int
    stray_casts: int


FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)


def report(path: Path) -> GraphReport:
    """Count an ONNX file's nodes; its weights are not read."""
    graph = onnx.load(path, load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    used_by: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            used_by.setdefault(name, []).append(node)
    kinds = Counter(node.op_type for node in graph.node)
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    casts = [node for node in graph.node if node.op_type == "Cast" and node.attribute[0].i in FLOATS]
    ends = {value.name for value in (*graph.input, *graph.output)}
    return GraphReport(
        nodes=len(graph.node),
        softmaxes=len(softmaxes),
        attention=sum(_is_attention(node, made_by, used_by) for node in softmaxes) + kinds["Attention"],
        normalisations=sum(kinds[f"{kind}Normalization"] for kind in ("Group", "Layer", "RMS")),
        other_normalisations=kinds["InstanceNormalization"],
        casts=len(casts),
        stray_casts=sum(_is_stray(node, ends, made_by, used_by) for node in casts),
    )


def _is_attention(softmax, made_by: dict, used_by: dict) -> bool:
    """MatMul, perhaps a mask added, Softmax, MatMul: a scale or a cast in between breaks TensorRT's pattern."""
    before = made_by.get(softmax.input[0])
    if before is not None and before.op_type == "Add":
        before = next(
            (made_by[x] for x in before.input if x in made_by and made_by[x].op_type == "MatMul"), None
        )
    after = used_by.get(softmax.output[0], [])
    return (
        before is not None and before.op_type == "MatMul" and [node.op_type for node in after] == ["MatMul"]
    )


def _is_stray(cast, ends: set[str], made_by: dict, used_by: dict) -> bool:
    if cast.input[0] in ends or cast.output[0] in ends:
        return False
    around = [made_by.get(cast.input[0]), *used_by.get(cast.output[0], [])]
    return not any(node is not None and node.op_type == "Resize" for node in around)
