"""Threads: pipelines with other settings do not disturb each other, and one pipeline or engine serves several."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from kernels import ops
from runtime import LocalControlPipeline, Region
from runtime.engines.base import BINDINGS
from runtime.loading.load import from_diffusers
from runtime.model.attention import use_attention
from runtime.text.encode import encode_prompts
from tests.support import engines, saved_model
from tests.support.tiny import make_adapter, make_pipeline

THREADS, TURNS = 4, 3
LONG = "a red circle and a blue star " * 20  # over 77 tokens: the tokenizer is asked twice


@pytest.fixture(autouse=True)
def _one_thread_each():
    """Two threads that compute on as many cores give the bits of one; with more the sums' order changes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def pipeline(kind: str) -> LocalControlPipeline:
    if kind == "torch":
        return LocalControlPipeline.from_pretrained(
            saved_model.folder(), {"canny": engines.adapter()}, device="cpu"
        )
    return LocalControlPipeline.from_engine(engines.folder(kind))


def condition(seed: int) -> torch.Tensor:
    return (torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(seed)) > 0.8).float()


def calls() -> list[dict]:
    """Of other prompts, controls, sizes and numbers of rows."""
    return [
        {"prompt": "a red circle", "regions": [Region(condition(0))]},
        {"prompt": LONG, "regions": [Region(condition(1), scale=0.5, end=0.5)]},
        {"prompt": "a star", "guidance": 1.0},
        {"prompt": "a ring", "height": 32, "width": 96, "regions": [Region(condition(2)[..., :32, :])]},
    ]


def in_threads(work: list[Callable], turns: int = TURNS) -> list:
    """Run each piece of work in a thread of its own, `turns` times; return all that came of each."""
    with ThreadPoolExecutor(len(work)) as pool:
        running = [pool.submit(lambda call=call: [call() for _ in range(turns)]) for call in work]
        return [future.result() for future in running]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "openvino"])
def test_one_pipeline_serves_several_threads(kind):
    pipe = pipeline(kind)

    def draw(asked: dict) -> torch.Tensor:
        return pipe(**asked, steps=4, seed=3).latents

    alone = [draw(asked) for asked in calls()]
    made = in_threads([lambda asked=asked: draw(asked) for asked in calls()])
    for asked, expected, found in zip(calls(), alone, made, strict=True):
        for latents in found:
            assert torch.equal(latents, expected), asked["prompt"]


def test_a_tokenizer_serves_several_threads():
    model = from_diffusers(make_pipeline())
    texts = ["a star", LONG, "", "a red circle on sand"]
    alone = [encode_prompts(model, [text])[0] for text in texts]
    with torch.inference_mode():
        made = in_threads([lambda text=text: encode_prompts(model, [text])[0] for text in texts], turns=50)
    assert all(torch.equal(x, expected) for expected, found in zip(alone, made, strict=True) for x in found)


@pytest.mark.skipif(not ops.INTERPRETED, reason="Triton's interpreter runs the kernels here")
def test_pipelines_with_other_settings_do_not_disturb_each_other():
    settings = [
        {"backend": "torch", "attention": "math"},
        {"backend": "torch"},
        {"backend": "auto", "attention": "flash"},
    ]
    pipes = [
        LocalControlPipeline(from_diffusers(make_pipeline()), {"canny": make_adapter()}, **given)
        for given in settings
    ]
    region = Region(condition(0))

    def draw(pipe: LocalControlPipeline) -> torch.Tensor:
        return pipe("a star", [region], height=64, width=64, steps=2, seed=0).latents

    before = _state()
    alone = [draw(pipe) for pipe in pipes]
    made = in_threads([lambda pipe=pipe: draw(pipe) for pipe in pipes], turns=34)
    for expected, found in zip(alone, made, strict=True):
        assert all(torch.equal(latents, expected) for latents in found)
    assert _state() == before


def _state() -> dict:
    """What is the process's, and was changed by calls in the past."""
    kinds = ("flash", "mem_efficient", "math", "cudnn")
    enabled = {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds}
    return {**enabled, "backend": ops.current_backend(), "threads": torch.get_num_threads()}


def test_an_attention_ends_with_its_thread():
    def inside():
        with use_attention("math"):
            return _state()

    before = _state()
    assert all(found == [before] * TURNS for found in in_threads([inside] * THREADS))


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_an_engine_keeps_few_sizes(kind):
    pipe = pipeline(kind)
    engine = pipe.denoiser.engine
    for size in range(BINDINGS + 1):
        pipe("a star", height=32 + 16 * (size % 3), width=32 + 16 * (size // 3), steps=1, guidance=1, seed=0)
    assert len(engine._bindings) <= BINDINGS
    first = pipe("a star", height=32, width=32, steps=2, guidance=1, seed=0).latents
    pipe("a star", height=64, width=64, steps=1, guidance=1, seed=0)
    assert torch.equal(pipe("a star", height=32, width=32, steps=2, guidance=1, seed=0).latents, first)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_memory_is_flat_over_many_sizes():
    pipe = pipeline("onnxruntime")
    sizes = [(32 + 16 * (i % 5), 32 + 16 * (i // 5 % 5)) for i in range(50)]

    def resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    for height, width in sizes[:25]:
        pipe("a star", height=height, width=width, steps=1, seed=0)
    before = resident()
    for height, width in sizes[25:]:
        pipe("a star", height=height, width=width, steps=1, seed=0)
    assert resident() - before < 30  # MiB
