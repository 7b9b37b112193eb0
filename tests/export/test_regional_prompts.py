"""Engines that take regions' words: --regional-prompts."""

from functools import cache
from pathlib import Path

import pytest
import torch

from export import build_engine, verify
from runtime import LocalControlPipeline, Region
from runtime.capabilities import of_manifest
from runtime.engines.manifest import read_manifest
from runtime.errors import InputError
from runtime.sampling.request import Request
from tests.runtime.control.test_words import LEFT, TOP, WORDS
from tests.runtime.test_pipeline import PROMPT, condition
from tests.support import engines, saved_model
from tests.support.together import assert_as_alone, drawn_together
from tests.support.tolerances import relative_rms

SIZES = ("--height", "64", "--width", "64", "--batch", "1:1:2")


@cache
def folder(target: str) -> Path:
    path = Path(engines._DIRECTORY.name) / f"{target} with words"
    model = ["--model", str(saved_model.folder()), "--precision", "fp32", "--components", "unet"]
    return engines.build(path, "--target", target, *model, *SIZES, "--regional-prompts", "2")


@pytest.mark.parametrize("target", engines.TARGETS)
def test_engines_draw_words_as_torch_does(target):
    adapters = {"canny": engines.adapter()}
    engine = LocalControlPipeline.from_engine(folder(target), adapters)
    torch_pipe = LocalControlPipeline.from_pretrained(saved_model.folder(), adapters, dtype="fp32")
    regions = [Region(condition(), mask=LEFT, prompt=WORDS, end=0.6), Region(prompt="snow", mask=TOP)]
    for count in (2, 1, 0):
        drawn = [p(PROMPT, regions[:count], steps=3, seed=3).latents for p in (engine, torch_pipe)]
        assert relative_rms(*drawn) < 1e-4
    with pytest.raises(
        InputError, match="regions: 3 with words, and the engines take 2; rebuild them with --reg"
    ):
        engine(PROMPT, [*regions, regions[1]], steps=3)


@pytest.mark.parametrize("target", engines.TARGETS)
def test_requests_with_words_share_the_calls(target):
    """Some with words, some without, with a control, and of several lengths: each as by itself."""
    pipe = LocalControlPipeline.from_engine(folder(target), {"canny": engines.adapter()})
    names = ["words", "two words", "plain", "control", "no guidance"]
    results, ticks = drawn_together(pipe, names)
    assert_as_alone(pipe, results)
    assert ticks == 5


def test_the_engines_are_compared_with_torch():
    rows = list(verify.verify(folder("onnxruntime"), engines_only=True))
    assert rows and all(row.passed for row in rows)


def test_engines_without_words_say_so_before_anything_is_loaded():
    able = of_manifest(read_manifest(engines.folder("onnxruntime")))
    with pytest.raises(
        InputError, match="regions: 1 with words, and the engines take 0; rebuild them with --reg"
    ):
        able.check(Request(PROMPT, [Region(prompt=WORDS, mask=torch.ones(8, 8))]))


@pytest.mark.parametrize("count", ["-1", "17"])
def test_counts_out_of_range_are_refused(count, tmp_path, capsys):
    arguments = ["--target", "onnxruntime", "--regional-prompts", count, "--out", str(tmp_path / "engines")]
    assert build_engine.main(arguments) == 2
    assert f"--regional-prompts {count}: expected a whole number from 0 to 16" in capsys.readouterr().err
