"""Every implementation of attention gives the definition's values, and what cannot run says so."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from runtime.errors import InputError
from runtime.model import attention
from runtime.model.attention import ATTENTIONS, OWN, PACKAGES, attend, check_attention, use_attention
from tests.support.tolerances import assert_close

CPU = torch.device("cpu")


def inputs(device="cpu", dtype=torch.float32, tokens=77):
    """Rows of 4 heads, 16 wide: 60 queries over `tokens` keys."""
    return [torch.randn(2, 4, s, 16).to(device, dtype) for s in (60, tokens, tokens)]


def defined(query, key, value):
    weights = (query.double() @ key.double().mT / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ value.double()).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["auto", "flash", "math"])
def test_what_a_cpu_has_follows_the_definition(name):
    given = inputs()
    check_attention(name, CPU, torch.float32)
    with use_attention(name):
        assert_close(name, attend(*given), defined(*given))


@pytest.mark.parametrize("scores", [2**20, 3 * 60 * 77, 60 * 77, 25 * 77, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_products_of_heads_and_of_queries_follow_the_definition(monkeypatch, scores, dtype):
    monkeypatch.setattr(attention, "SCORES", scores)
    given = inputs(dtype=dtype)
    expected = defined(*given)
    assert_close("out", attention._in_products(*given).transpose(1, 2).flatten(2), expected)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    assert_close("out", attention._in_products(*strided).transpose(1, 2).flatten(2), expected)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "amx", "rows", "products"),
    [
        (torch.bfloat16, False, 16, True),
        (torch.bfloat16, False, 1, False),  # few scores
        (torch.bfloat16, True, 16, False),
        (torch.float32, False, 16, False),
    ],
)
def test_products_where_pytorchs_own_are_slow(monkeypatch, dtype, amx, rows, products):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    taken = []
    monkeypatch.setattr(attention, "_in_products", lambda q, k, v: taken.append(q) or q)
    given = [x.repeat(rows, 1, 1, 1) for x in inputs(dtype=dtype)]
    attend(*given)
    with use_attention("flash"):  # asked for by name
        attend(*given)
    assert bool(taken) is products and len(taken) <= 1


def test_an_exported_graph_has_attention_whole_for_any_batch(monkeypatch):
    """Also on a machine where the products win."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(attention, "FEW_SCORES", 0)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return attend(query, key, value)

    batch = torch.export.Dim("batch", min=1, max=8)
    with torch.no_grad():
        given = tuple(inputs(dtype=torch.bfloat16))
        made = torch.export.export(Attend(), given, dynamic_shapes=[{0: batch}] * 3, strict=False)
    called = {node.target for node in made.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.scaled_dot_product_attention.default in called


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_what_a_gpu_has_follows_the_definition(name, dtype):
    try:
        check_attention(name, torch.device("cuda"), dtype)
    except InputError as error:
        pytest.skip(str(error))
    given = inputs("cuda", dtype)
    with use_attention(name):
        assert_close(name, attend(*given), defined(*given))


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_get_tokens_before_heads(name, monkeypatch):
    """They are not installed here: their functions are stood in for by one that has their documented layout."""
    seen = []

    def theirs(query, key, value):  # (B, S, heads, D)
        seen.append([tuple(x.shape) for x in (query, key, value)])
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(
            1, 2
        )

    module, function = PACKAGES[name]
    monkeypatch.setitem(sys.modules, module.partition(".")[0], SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: theirs}))
    given = inputs()
    with use_attention(name):
        assert_close(name, attend(*given), defined(*given))
    assert seen == [[(2, 60, 4, 16), (2, 77, 4, 16), (2, 77, 4, 16)]]


def test_the_choice_ends_with_its_block_and_with_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=lambda q, k, v: v * 0))
    given = inputs(tokens=60)
    try:
        with use_attention("flash_attn"):
            assert not attend(*given).any()
            raise KeyError
    except KeyError:
        assert attend(*given).any()


def test_a_compiler_sees_one_operation_of_any_size():
    given = inputs()
    expected = attend(*given)
    with torch.no_grad():
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*given), expected)
        torch.library.opcheck(torch.ops.localcontrol.attend, tuple(given))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fast",
            "attention 'fast': unknown, expected auto, flash, cudnn, efficient, math, xformers, flash_attn",
        ),
        ("cudnn", "attention 'cudnn' cannot run on cpu in float32: .*; expected another of auto"),
        ("xformers", "attention 'xformers' needs the package xformers; install it: pip install xformers"),
        ("flash_attn", "attention 'flash_attn' needs the package flash-attn; "),
    ],
)
def test_what_cannot_run_is_said_in_one_line(name, message, monkeypatch):
    for module in ("xformers", "xformers.ops", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)  # not installed, wherever this runs
    if name in OWN and torch.cuda.is_available():
        pytest.skip("a GPU has it")
    with pytest.raises(InputError, match=message) as caught:
        check_attention(name, CPU, torch.float32)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
