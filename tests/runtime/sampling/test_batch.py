"""runtime.sampling.batch: requests that share the UNet's calls are each drawn as by themselves."""

import pytest
import torch

from runtime import Cancelled
from runtime.sampling import torch_step
from runtime.sampling.batch import Batch
from runtime.sampling.drawing import Drawing
from runtime.sampling.request import Request
from runtime.sampling.torch_step import Part
from tests.support.together import LIMIT, REQUESTS, assert_as_alone, drawn_together, pipe


def test_everything_at_once():
    results, ticks = drawn_together(pipe(), REQUESTS)
    assert results.keys() == REQUESTS.keys()
    assert_as_alone(pipe(), results)
    assert ticks == 8  # of the longest: "held" takes two runs of four


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "plain"])
def test_each_beside_a_plain_one(name):
    results, _ = drawn_together(pipe(), ["plain", name])
    assert_as_alone(pipe(), results)


def test_a_request_joins_between_steps():
    results, ticks = drawn_together(pipe(), ["plain", "control"], late=["words", "other steps"])
    assert_as_alone(pipe(), results)
    assert ticks == 2 + 7


def test_rows_share_one_call(monkeypatch):
    """Three requests, one of them without guidance and one of two pictures: one forward pass a step."""
    calls, unet = [], pipe().model.unet
    forward = type(unet).forward

    def counted(self, sample, *given):
        calls.append(len(sample))
        return forward(self, sample, *given)

    monkeypatch.setattr(type(unet), "forward", counted)
    drawn_together(pipe(), ["plain", "no guidance", "two pictures"])
    assert calls == [2 + 1 + 4] * 3 + [2 + 4]


def test_prompts_of_lengths_that_do_not_go_together_share_no_call(monkeypatch):
    """Of 5, 7 and 8 chunks the least common multiple is 280; those of 5, 1 and 5 share calls."""
    asked = [
        Request(" ".join(["star"] * (75 * n - 9)), steps=2, seed=n, output_type="latent")
        for n in (5, 7, 8, 1, 5)
    ]
    lengths, texts = [], torch_step._texts

    def counted(parts, dtype):
        found = texts(parts, dtype)
        lengths.append((len(parts), found[0][0].shape[-2] // 77))
        return found

    monkeypatch.setattr(torch_step, "_texts", counted)
    with torch.inference_mode():
        drawings = [Drawing(pipe(), each) for each in asked]
        runs, batch = [each.runs() for each in drawings], Batch(pipe().denoiser)
        going = [next(each) for each in runs]
        for _ in range(2):
            assert not batch.tick(going)
        assert [next(each, None) for each in runs] == [None] * 5
    assert lengths == [(3, 5)]
    for each, drawing in zip(asked, drawings, strict=True):
        assert (drawing.result.latents - pipe().draw(each).latents).abs().max() < LIMIT


def test_what_goes_wrong_with_one_leaves_the_others():
    def cancel(at):
        if at.step == 2:
            at.cancel()

    good, bad = Drawing(pipe(), REQUESTS["plain"]), Drawing(pipe(), REQUESTS["control"], cancel)
    with torch.inference_mode():
        drawings = good.runs(), bad.runs()
        runs, batch = [next(runs) for runs in drawings], Batch(pipe().denoiser)
        assert not batch.tick(runs)
        failed = batch.tick(runs)
        assert list(failed) == [runs[1]] and isinstance(failed[runs[1]], Cancelled)
        while not runs[0].done:
            batch.tick(runs[:1])
        next(drawings[0], None)
    assert_as_alone(pipe(), {"plain": good.result})


def test_a_part_alone_is_its_own_step():
    with torch.inference_mode():
        run = next(Drawing(pipe(), REQUESTS["control"]).runs())
        expected = run.step(run.sample(), 0)
        (found,) = pipe().denoiser.joint()([Part(run.step, run.sample(), 0)])
    assert torch.equal(found, expected)


def test_texts_and_control_are_put_together_once(monkeypatch):
    """For as long as the same requests share the calls; anew when one comes or goes, or a region begins to act."""
    made = []
    for name in ("_texts", "_control"):
        make = getattr(torch_step, name)

        def counted(parts, other, make=make, name=name):
            made.append((name, len(parts)))
            return make(parts, other)

        monkeypatch.setattr(torch_step, name, counted)
    results, _ = drawn_together(pipe(), ["plain", "other steps"], late=["control"])
    assert_as_alone(pipe(), results)
    # two, from the third step on three, from the fifth one the two that are left
    assert [n for name, n in made if name == "_texts"] == [2, 3, 2]
    assert [n for name, n in made if name == "_control"][:2] == [2, 3]
