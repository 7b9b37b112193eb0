"""runtime.engines.captured_parts: text encoders and adapters as graphs, one a size, or as they are if none can be."""

import json
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from diffusers import T2IAdapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from runtime import LocalControlPipeline, Region
from runtime.engines import captured_parts as module
from runtime.engines.captured_parts import SIZES, Captured, CapturedTextEncoder, Pool, capture_parts
from runtime.text.encode import Reading, encode_prompts
from tests.support import tiny

CPU = torch.device("cpu")


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that run their call again, as a CPU has none; returns the sizes that were recorded, as a count."""
    made = SimpleNamespace(count=0)

    def captured(call, device, pool):
        made.count += 1
        return call

    monkeypatch.setattr(module, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return made


def pipeline():
    return LocalControlPipeline.from_diffusers(tiny.make_pipeline(), {"canny": tiny.make_adapter()})


@torch.inference_mode()
def test_texts_and_features_are_the_same(recorded):
    plain = pipeline()
    model, adapters = capture_parts(plain.model, {**plain.adapters, "again": plain.adapters["canny"]}, CPU)
    assert (
        adapters["again"] is adapters["canny"] and adapters["canny"].config is plain.adapters["canny"].config
    )
    for prompts in (["a star"], ["a star", "a much longer prompt"], ["a heart"]):
        for reading in (Reading(), Reading(clip_skip=1)):
            pairs = zip(*(encode_prompts(m, prompts, reading) for m in (model, plain.model)), strict=True)
            assert all(torch.equal(*pair) for pair in pairs), prompts
    for size in (64, 96, 64):
        given = torch.rand(1, 1, 1, size).expand(1, 1, size, size)
        pairs = zip(adapters["canny"](given), plain.adapters["canny"](given), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), size
    assert recorded.count == 6  # two numbers of texts for each encoder, two sizes of the adapter


@torch.inference_mode()
def test_a_picture_is_the_same(recorded):
    plain = pipeline()
    graphs = LocalControlPipeline(*capture_parts(plain.model, plain.adapters, CPU))
    call = {"steps": 1, "seed": 3, "output_type": "latent", "regions": [Region(torch.rand(1, 64, 64))]}
    first, second = (pipe("a star", height=64, width=64, **call).latents for pipe in (graphs, plain))
    assert torch.equal(first, second) and recorded.count == 3


@torch.inference_mode()
def test_a_call_leaves_what_an_earlier_one_returned(recorded):
    model, _ = capture_parts(pipeline().model, {}, CPU)
    first, pooled = encode_prompts(model, ["a star"], Reading())
    kept = first.clone(), pooled.clone()
    assert not torch.equal(encode_prompts(model, ["a heart"], Reading())[0], first)
    assert torch.equal(first, kept[0]) and torch.equal(pooled, kept[1])
    states = model.text_encoders[0](torch.zeros(1, 77, dtype=torch.long)).hidden_states
    other = model.text_encoders[0](torch.ones(1, 77, dtype=torch.long)).hidden_states
    assert not torch.equal(states[-1], other[-1])


def test_a_text_encoder_on_another_device_stays_as_it_is(recorded):
    plain = pipeline().model
    plain.text_encoders[0].to("meta")
    model, _ = capture_parts(plain, {}, CPU)
    assert model.text_encoders[0] is plain.text_encoders[0]
    assert isinstance(model.text_encoders[1], CapturedTextEncoder)


def test_sizes_used_long_ago_are_forgotten(recorded):
    double = Captured("it", lambda given: [2 * given], Pool(CPU))
    for size in (*range(1, SIZES + 2), 1, SIZES + 1):
        assert torch.equal(double(torch.ones(size))[0], torch.full((size,), 2.0))
    assert recorded.count == SIZES + 2 and len(double._recorded) == SIZES


def test_what_cannot_be_captured_runs_as_it_is(recorded, monkeypatch):
    def failing(call, device, pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(module, "captured", failing)
    double = Captured("an adapter", lambda given: [2 * given], Pool(CPU))
    with pytest.warns(
        UserWarning, match="cuda graph: an adapter cannot be captured, .*: CUDA error: operation not"
    ):
        assert double(torch.ones(2))[0].tolist() == [2, 2]
    assert double(torch.ones(2))[0].tolist() == [2, 2]  # and says nothing more: a warning is an error here


def test_what_the_function_refuses_by_itself_takes_no_graph_from_the_others(recorded):
    def double(given):
        if len(given) == 3:
            raise RuntimeError("CUDA out of memory")
        return [2 * given]

    doubled = Captured("an adapter", double, Pool(CPU))
    for size in (2, 3, 2, 4):
        if size == 3:
            with pytest.raises(RuntimeError, match="^CUDA out of memory$"):
                doubled(torch.ones(size))
        else:
            assert doubled(torch.ones(size))[0].tolist() == [2] * size
    assert recorded.count == 2 and len(doubled._recorded) == 2


def test_work_on_another_device_is_not_lost(recorded):
    away = Captured("an adapter", lambda given: [given.to("meta")], Pool(CPU))
    with pytest.warns(UserWarning, match="its results are not on cpu"):
        assert away(torch.ones(2))[0].device.type == "meta"
    assert recorded.count == 0


class OnDevice(TorchDispatchMode):
    """Counts operations, and keeps those that another device has a part in: a graph cannot hold them."""

    def __init__(self):
        super().__init__()
        self.count, self.crossing = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        tensors = [
            leaf for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, torch.Tensor)
        ]
        self.count += 1
        if {tensor.device.type for tensor in tensors} - {"meta"}:
            self.crossing.append(str(function))
        return result


def config(name):
    return CLIPTextConfig.from_dict(
        json.loads((files("runtime.configs.sdxl") / name / "config.json").read_text())
    )


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "adapter"])
def test_sdxls_parts_neither_ask_for_values_nor_leave_the_device(name):
    """What a graph cannot hold; tensors of "meta" have no values, and asking for one raises."""
    with torch.device("meta"):
        if name == "adapter":
            part = T2IAdapter(3, [320, 640, 1280, 1280], 2, 16, "full_adapter_xl")
            given = torch.zeros(1, 3, 1024, 1024)
        else:
            made = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
            part, given = made(config(name)), torch.zeros(2, 77, dtype=torch.long)
    run = part if name == "adapter" else lambda ids: module._encode(part, ids)
    with torch.inference_mode(), OnDevice() as seen:
        results = run(given)
    assert not seen.crossing and seen.count > 30 and {result.device.type for result in results} == {"meta"}
