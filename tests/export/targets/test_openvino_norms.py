"""Normalisations without casts: the same values, the same names of constants, and others left alone."""

from collections import Counter

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as op
from torch.nn import functional as F

from export.targets.openvino_norms import rewrite_norms
from runtime.engines.openvino import shared, the_core
from tests.support.tolerances import relative_rms

CHANNELS, GROUPS, EPS = 12, 4, 1e-5
SHAPES = [(1, 12, 2, 2), (3, 12, 5, 7)]
generator = torch.Generator().manual_seed(0)
WEIGHT, BIAS = (torch.randn(CHANNELS, generator=generator).bfloat16() for _ in range(2))
TWO = torch.full((1,), 2.0).bfloat16()


def cast(value, kind=ov.Type.f32):
    return op.convert(value, kind.to_string())


def constant(tensor: torch.Tensor, name: str):
    node = op.constant(shared(tensor))  # its memory is the tensor's
    node.set_friendly_name(name)
    return node


def model(build, shape=(-1, CHANNELS, -1, -1)) -> ov.Model:
    data = op.parameter(ov.PartialShape(list(shape)), ov.Type.bf16, name="x")
    return ov.Model([op.result(build(data))], [data], "norms")


def group_norm(data):
    weight, bias = (cast(constant(x, name)) for x, name in ((WEIGHT, "weight"), (BIAS, "bias")))
    return cast(op.group_normalization(cast(data), weight, bias, GROUPS, EPS), ov.Type.bf16)


def group_norm_silu(data):
    normal = group_norm(data)
    return op.multiply(normal, op.sigmoid(normal))


def group_norm_gated(data):
    """No SiLU: another sigmoid's product."""
    normal = group_norm(data)
    return op.multiply(op.multiply(normal, data), op.sigmoid(normal))


def layer_norm(data):
    normal = op.mvn(cast(data), np.array([-1]), True, EPS, "inside_sqrt")
    return op.multiply(op.convert_like(normal, data), constant(TWO, "weight"))


def run(made: ov.Model, data: torch.Tensor) -> torch.Tensor:
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    request = the_core().compile_model(made, "CPU", options).create_infer_request()
    out = torch.empty(data.shape, dtype=torch.bfloat16)
    request.set_input_tensor(shared(data))
    request.set_output_tensor(shared(out))
    request.infer()
    return out.float()


def expected(build, x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    if build is layer_norm:
        return 2 * F.layer_norm(x, x.shape[-1:], eps=EPS)
    normal = F.group_norm(x, GROUPS, WEIGHT.float(), BIAS.float(), EPS)
    return {
        group_norm: normal,
        group_norm_silu: F.silu(normal),
        group_norm_gated: normal * x * normal.sigmoid(),
    }[build]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("build", [group_norm, group_norm_silu, group_norm_gated, layer_norm])
def test_values_without_casts(build, shape):
    data = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16() * 3 + 1
    before, after = model(build), model(build)
    rewrite_norms(after)
    kinds = Counter(node.get_type_name() for node in after.get_ops())
    assert not {"Convert", "ConvertLike", "GroupNormalization"} & set(kinds) and kinds["MVN"] == 1
    for made in (before, after):
        assert relative_rms(run(made, data), expected(build, data)) < 2e-2  # some roundings to bfloat16
    constants = [n.get_friendly_name() for n in after.get_ops() if n.get_type_name() == "Constant"]
    assert "weight" in constants


def test_what_is_no_normalisation_between_casts_stays():
    def float32(data):
        weight, bias = constant(WEIGHT.float(), "weight"), constant(BIAS.float(), "bias")
        return op.group_normalization(op.relu(cast(data)), weight, bias, GROUPS, EPS)

    def read_twice(data):
        normal = op.mvn(cast(data), np.array([-1]), True, EPS, "inside_sqrt")
        return op.add(normal, op.relu(normal))

    for build in (float32, read_twice):
        made = model(build)
        names = [node.get_friendly_name() for node in made.get_ops()]
        rewrite_norms(made)
        assert [node.get_friendly_name() for node in made.get_ops()] == names
