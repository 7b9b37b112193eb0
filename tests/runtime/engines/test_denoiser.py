"""runtime.engines.denoiser: requests that share an engine's calls are each drawn as by themselves."""

from functools import cache

import pytest

from runtime import LocalControlPipeline
from tests.support import engines, saved_model
from tests.support.together import REQUESTS, assert_as_alone, drawn_together, pipe

IN_TORCH = [name for name in REQUESTS if name not in ("cached",)]
# what these folders do not take: words, ControlNets, more than 77 tokens, and a cache
ON_ENGINES = [name for name in IN_TORCH if not any(w in name for w in ("words", "controlnet", "long"))]


@cache
def compiled(compiler):
    base = pipe()
    other = LocalControlPipeline(base.model, base.adapters, controlnets=base.controlnets)
    return other.compile(compiler=compiler)


@cache
def on_engine(target):
    return LocalControlPipeline.from_engine(engines.folder(target))


def calls(pipe, monkeypatch):
    """A list that gets the rows of every call."""
    made = []
    for engine in {id(e): e for e in (pipe.denoiser.engine, *pipe.denoiser.variants.values())}.values():
        bind = engine.bind
        monkeypatch.setattr(engine, "bind", lambda bind=bind, **s: made.append(s["rows"]) or bind(**s))
    return made


def test_everything_at_once_in_torch_as_an_engine():
    results, ticks = drawn_together(compiled(None), IN_TORCH)
    assert_as_alone(compiled(None), results)
    assert ticks == 8


@pytest.mark.parametrize("target", engines.TARGETS)
def test_everything_at_once(target):
    results, ticks = drawn_together(on_engine(target), ON_ENGINES)
    assert_as_alone(on_engine(target), results)
    assert ticks == 8


@pytest.mark.parametrize("target", engines.TARGETS)
def test_a_request_joins_between_steps(target):
    results, _ = drawn_together(on_engine(target), ["plain", "control"], late=["other steps"])
    assert_as_alone(on_engine(target), results)


def test_rows_share_the_calls_that_the_profile_allows(monkeypatch):
    """Two rows, one row, four rows a step, of at most four in a call."""
    made = calls(on_engine("onnxruntime"), monkeypatch)
    drawn_together(on_engine("onnxruntime"), ["plain", "no guidance", "two pictures"])
    assert made == [3, 4] * 3 + [2, 4]


def test_an_engine_of_each_size_is_asked_for_few(monkeypatch):
    """Rows that are not asked for are computed with, where a size would have to be compiled first."""
    pipe = on_engine("openvino")
    engine = pipe.denoiser.engine
    assert engine.by_size
    assert [engine.rows_for(rows) for rows in range(1, 5)] == [1, 2, 3, 4]
    profile = engines.Profile((1, 1, 10), (64, 64, 64), (64, 64, 64))
    monkeypatch.setattr(engine, "profile", profile)
    expected = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8, 9: 12, 12: 12, 13: 16, 17: 20, 20: 20}
    assert {rows: engine.rows_for(rows) for rows in expected} == expected


def test_padded_rows_change_nothing(monkeypatch):
    pipe = compiled(None)
    for engine in (pipe.denoiser.engine, *pipe.denoiser.variants.values()):
        monkeypatch.setattr(engine, "by_size", True)
    made = calls(pipe, monkeypatch)
    results, _ = drawn_together(pipe, ["plain", "no guidance", "control"])
    assert_as_alone(pipe, results)
    assert made[:3] == [6, 6, 6]  # of five


def test_the_unguided_half_has_its_own_control_on_an_engine():
    name = "another share unguided"
    in_torch = LocalControlPipeline.from_pretrained(saved_model.folder(), {"canny": engines.adapter()})
    for target in engines.TARGETS:
        assert_as_alone(in_torch, {name: on_engine(target).draw(REQUESTS[name])})
