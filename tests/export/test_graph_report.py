"""export.graph_report: counts on graphs made by hand, and on the exported UNet."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export.graph_report import report
from tests.support import engines


def save(path: Path, *nodes: onnx.NodeProto) -> Path:
    """A graph x, w -> y of these nodes."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xwy"]
    graph = helper.make_graph(nodes, "graph", ports[:2], ports[2:])
    onnx.save(helper.make_model(graph), path)
    return path


def attention(*between: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x w -> a, perhaps more, -> b, softmax -> c, c x -> y."""
    softmax = helper.make_node("Softmax", ["b" if between else "a"], ["c"])
    return [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        *between,
        softmax,
        helper.make_node("MatMul", "cx", "y"),
    ]


CASES = {
    "plain": ([], 1),
    "mask added": ([helper.make_node("Add", ["a", "w"], ["b"])], 1),
    "scale on the scores": ([helper.make_node("Mul", ["a", "w"], ["b"])], 0),
    "cast on the scores": ([helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT16)], 0),
}


@pytest.mark.parametrize(("between", "expected"), CASES.values(), ids=CASES)
def test_attention_is_counted_in_the_form_that_is_fused(tmp_path, between, expected):
    found = report(save(tmp_path / "graph.onnx", *attention(*between)))
    assert (found.softmaxes, found.attention) == (1, expected)


def test_casts_at_the_ends_and_around_a_resize_are_not_stray(tmp_path):
    half, full = TensorProto.FLOAT16, TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=half),  # of an input
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Cast", ["b"], ["c"], to=full),  # before a resize
        helper.make_node("Resize", ["c", "", "w"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Cast", ["e"], ["f"], to=half),  # stray
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("Cast", ["g"], ["y"], to=full),  # of an output
    ]
    found = report(save(tmp_path / "graph.onnx", *nodes))
    assert (found.casts, found.stray_casts) == (4, 1)


def test_normalisations_are_told_from_those_that_are_not_fused(tmp_path):
    nodes = [
        helper.make_node("InstanceNormalization", ["x", "w", "w"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "w"], ["y"]),
    ]
    found = report(save(tmp_path / "graph.onnx", *nodes))
    assert (found.normalisations, found.other_normalisations) == (1, 1)


def test_the_exported_unet_is_all_in_fused_forms():
    found = report(engines.graph("unet"))
    assert found.attention == found.softmaxes > 0
    assert found.normalisations > 0
    assert found.other_normalisations == found.casts == 0
