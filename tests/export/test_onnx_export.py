"""The exported ONNX files: their names and sizes, their weights, how attention and norms are spelled, exact values."""

import copy
import gc
import weakref
from collections import Counter
from functools import cache

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from export.graphs import AdapterGraph, adapter_component, make_components
from export.onnx_export import export_onnx
from runtime.loading.load import load_model
from runtime.model.blocks import Attention
from tests.support import engines, saved_model
from tests.support.tiny import make_adapter

FLOATS = {
    "fp32": TensorProto.FLOAT,
    "bf16": TensorProto.BFLOAT16,
    "fp16": TensorProto.FLOAT16,
}


@cache
def loaded(name: str) -> onnx.ModelProto:
    """One of the tiny model's graphs, with its weights."""
    return onnx.load(engines.graph(name))


def counts(model: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


def dimensions(values) -> dict[str, list[int | str]]:
    """Each value's shape as the file has it: numbers, and names of dynamic sizes."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in values
    }


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that computes each value."""
    return {output: node for node in model.graph.node for output in node.output}


def attribute(node: onnx.NodeProto, name: str):
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value that the file names one for."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("name", engines.ENGINES)
def test_the_file_is_valid_and_of_opset_21(name):
    onnx.checker.check_model(str(engines.graph(name)), full_check=True)
    assert [(opset.domain, opset.version) for opset in loaded(name).opset_import] == [("", 21)]
    assert not loaded(name).functions


@pytest.mark.parametrize("name", engines.ENGINES)
def test_inputs_and_outputs_have_names_types_and_dynamic_sizes(name):
    component, model = engines.component(name), loaded(name)
    for ports, values in ((component.inputs, model.graph.input), (component.outputs, model.graph.output)):
        assert [value.name for value in values] == [port.name for port in ports]
        for port, value in zip(ports, values, strict=True):
            expected = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}[port.dtype]
            assert value.type.tensor_type.elem_type == expected, port.name
    expected = {
        port.name: [x if isinstance(x, int) else str(x) for x in port.shape] for port in component.inputs
    }
    assert dimensions(model.graph.input) == expected


@pytest.mark.parametrize("name", engines.ENGINES)
def test_every_used_parameter_is_stored_under_its_name(name):
    """Used: has a gradient. The others, such as a text encoder's last layer, take no room in the file."""
    component = engines.component(name)
    module = copy.deepcopy(component.module).requires_grad_(True)
    given = engines.random_inputs(component.inputs, engines.sizes_of(component, 1))
    outputs = module(*(given[port.name] for port in component.inputs))
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), parameters.values(), allow_unused=True)
    used = {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    stored = {tensor.name: tensor for tensor in loaded(name).graph.initializer}
    named = {key.removesuffix(".T"): tensor for key, tensor in stored.items()}
    assert used == parameters.keys() & named.keys()
    for key in used:
        value = torch.from_numpy(numpy_helper.to_array(named[key]).copy())
        expected = parameters[key].T if named[key].name.endswith(".T") else parameters[key]
        assert torch.equal(value, expected), key
    rest = [tensor for key, tensor in named.items() if key not in used]
    assert sum(numpy_helper.to_array(tensor).nbytes for tensor in rest) < 30_000  # a causal mask: 77 x 77


@pytest.mark.parametrize("name", engines.ENGINES)
def test_no_weight_is_transposed_at_every_call(name):
    stored = {tensor.name for tensor in loaded(name).graph.initializer}
    for node in loaded(name).graph.node:
        assert node.op_type != "Transpose" or node.input[0] not in stored, node.input[0]


def test_no_cast_in_fp32():
    assert "Cast" not in counts(loaded("unet"))


@pytest.mark.parametrize("name", [name for name in engines.ENGINES if name != "adapter_canny"])
def test_attention_is_spelled_mul_transpose_matmul_softmax_matmul(name):
    """The pattern that TensorRT fuses: the scale on q, k transposed, nothing between Softmax and the second MatMul.

    k's Transpose is one with that of its heads: (B, S, heads, C) -> (B, heads, C, S). The text's comes with its heads.
    """
    model, made = loaded(name), makers(loaded(name))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
    layers = {
        "unet": sum(isinstance(m, Attention) for m in engines.component("unet").module.modules()),
        "vae_decoder": 1,
        "vae_encoder": 1,
        "text_encoder": 1,  # of two: the last layer's states are not used
        "text_encoder_2": 2,
    }
    assert len(softmaxes) == layers[name]
    for softmax in softmaxes:
        assert attribute(softmax, "axis") in (-1, 3)
        scores = made[softmax.input[0]]
        if name.startswith("text_encoder"):
            assert scores.op_type == "Add"  # the causal mask
            scores = made[scores.input[0]]
        assert scores.op_type == "MatMul"
        query, key = (made[value] for value in scores.input)
        assert (query.op_type, key.op_type) == ("Mul", "Transpose")
        assert numpy_helper.to_array(stored[query.input[1]]).size == 1
        assert list(attribute(key, "perm")) == (
            [0, 1, 3, 2] if key.input[0].startswith("key_") else [0, 2, 3, 1]
        )
        users = [node.op_type for node in model.graph.node if softmax.output[0] in node.input]
        assert users == ["MatMul"]


@pytest.mark.parametrize("name", ["unet", "vae_decoder", "vae_encoder"])
def test_each_group_norm_is_one_node(name):
    """As many as there are modules, of their groups and epsilons; none is spelled out."""
    module = engines.component(name).module
    part = {"vae_decoder": "vae.decoder", "vae_encoder": "vae.encoder"}.get(name, "unet")
    norms = [m for m in module.get_submodule(part).modules() if isinstance(m, nn.GroupNorm)]
    nodes = [node for node in loaded(name).graph.node if node.op_type == "GroupNormalization"]
    made = Counter((attribute(x, "num_groups"), round(attribute(x, "epsilon"), 8)) for x in nodes)
    assert made == Counter((norm.num_groups, norm.eps) for norm in norms)
    assert not {"InstanceNormalization", "ReduceMean", "ReduceVar"} & counts(loaded(name)).keys()


@pytest.mark.parametrize("name", engines.ENGINES)
def test_shapes_are_not_computed(name):
    """Reshapes have constant targets, but for those that make pixels' rows and columns of a row of pixels."""
    stored = {tensor.name for tensor in loaded(name).graph.initializer}
    shapes = dimensions(loaded(name).graph.value_info)
    for node in loaded(name).graph.node:
        if node.op_type == "Reshape" and node.input[1] not in stored:
            before, after = shapes[node.input[0]], shapes[node.output[0]]
            assert (len(before), len(after)) == (3, 4), node.name
            assert sum(isinstance(size, str) for size in after[1:]) == 2, node.name


def test_half_precision_is_in_the_graph():
    """fp16: float32 where latents, time and size come in and the prediction goes out, and nowhere else."""
    model = onnx.load(engines.graph("unet", "fp16", engines.STATIC))
    kinds, made = types(model), makers(model)
    assert [kinds[value.name] for value in model.graph.output] == [TensorProto.FLOAT]
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm", "GroupNormalization", "Softmax"):
            assert {kinds[x] for x in node.input} == {TensorProto.FLOAT16}, node.name
    assert made["prediction"].op_type == "Cast"


@pytest.mark.parametrize(
    ("name", "profile"),
    [("unet", engines.STATIC), ("vae_decoder", engines.PROFILE)],
    ids=["unet, static", "vae_decoder, dynamic"],
)
def test_no_resize_in_bf16(name, profile):
    """TensorRT has none: the nearest neighbours of a float32 copy are taken."""
    model = onnx.load(engines.graph(name, "bf16", profile))
    kinds = types(model)
    resizes = [node for node in model.graph.node if node.op_type == "Resize"]
    assert len(resizes) == counts(loaded(name))["Resize"] > 0
    for node in resizes:
        assert kinds[node.input[0]] == TensorProto.FLOAT
        assert makers(model)[node.input[0]].op_type == "Cast"
        users = [other for other in model.graph.node if node.output[0] in other.input]
        assert [(user.op_type, attribute(user, "to")) for user in users] == [("Cast", TensorProto.BFLOAT16)]
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {kinds[node.input[1]] for node in convolutions} == {TensorProto.BFLOAT16}


def test_a_static_profile_gives_static_sizes():
    """Every size in the file is a number, and nothing is left that computes one."""
    model, component = onnx.load(engines.graph("unet", "bf16", engines.STATIC)), engines.component("unet")
    sizes = engines.sizes_of(component, 1, engines.STATIC)
    assert sizes == {"rows": 2, "height": 64, "width": 96}
    for ports, values in ((component.inputs, model.graph.input), (component.outputs, model.graph.output)):
        assert dimensions(values) == {port.name: list(port.sized(sizes)) for port in ports}
    for shape in dimensions(model.graph.value_info).values():
        assert all(isinstance(size, int) for size in shape)
    assert not {"Shape", "Size", "Range"} & counts(model).keys()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 96), (96, 64)], ids=["32 x 96", "96 x 64"])
def test_pixel_unshuffle(channels, height, width, colour_adapter):
    """To the bit, with the adapter's own weights behind it."""
    adapter, source = (make_adapter(), engines.graph("adapter_canny")) if channels == 1 else colour_adapter
    component = adapter_component("adapter", adapter)
    given = engines.random_inputs(component.inputs, {"height": height, "width": width})
    model = onnx.load(source)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    unshuffled = onnx.helper.make_tensor_value_info(first.input[0], TensorProto.FLOAT, None)
    model.graph.output.append(unshuffled)
    made = engines.run_onnx(model.SerializeToString(), given)
    expected = nn.functional.pixel_unshuffle(given["condition"], 16)
    assert torch.equal(made.pop(first.input[0]), expected)
    engines.assert_near(made, engines.run_torch(component, given), 1e-5)


@pytest.fixture(scope="module")
def colour_adapter(tmp_path_factory):
    """An adapter that reads three channels, and its graph."""
    adapter = make_adapter(in_channels=3, seed=1).requires_grad_(False)
    path = tmp_path_factory.mktemp("colour") / "adapter.onnx"
    seen = []
    export_onnx(adapter_component("adapter", adapter), engines.PROFILE, path, lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == len(seen)  # progress: every weight written, one by one
    return adapter, path


def test_the_graph_of_an_adapter_gates_each_level():
    """Zero strength or an empty mask leaves a level all zeros; a mask's zeros are zeros in the features."""
    component = engines.component("adapter_canny")
    assert isinstance(component.module, AdapterGraph)
    given = engines.random_inputs(component.inputs, {"height": 64, "width": 64})
    given["strengths"] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    given["mask_0"] = torch.tensor([1.0, 1, 0, 0]).expand(1, 1, 4, 4).contiguous()
    given["mask_2"].zero_()
    made = engines.run_onnx(engines.graph("adapter_canny"), given)
    assert made["level_0"][..., :2].any() and not made["level_0"][..., 2:].any()
    assert not made["level_1"].any()
    assert not made["level_2"].any()
    assert made["level_3"].any()


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_an_export_lets_go_of_the_weights(name, tmp_path):
    """A full-size model must be out of memory before the engines are compiled."""
    model = load_model(saved_model.folder())
    module = next(make_components(model, {}, [name]))
    weights = {key: weakref.ref(weight) for key, weight in module.module.named_parameters()}
    path = tmp_path / "graph.onnx"
    export_onnx(module, engines.STATIC, path)
    del model, module
    gc.collect()
    written = {x.name.removesuffix(".T") for x in onnx.load(path, load_external_data=False).graph.initializer}
    alive = [key for key, weight in weights.items() if key in written and weight() is not None]
    assert written & set(weights)
    assert not alive
