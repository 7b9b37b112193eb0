"""Prompt encoding: against diffusers' own, the guidance batch, and what is said of a prompt that is too long."""

import warnings

import pytest
import torch

from runtime.loading.load import from_diffusers
from runtime.sampling.text import encode_guidance, encode_prompts
from tests.support.tiny import make_pipeline

PIPE = make_pipeline()
MODEL = from_diffusers(PIPE)
PROMPTS = ["a red circle and a blue star at night", "an unknown élan, 12!"]


def theirs(prompts, negative=None, guided=True):
    with torch.no_grad():
        text, no_text, pooled, no_pooled = PIPE.encode_prompt(
            prompts, negative_prompt=negative, do_classifier_free_guidance=guided, device="cpu"
        )
    return (torch.cat([no_text, text]), torch.cat([no_pooled, pooled])) if guided else (text, pooled)


@torch.no_grad()
def test_equals_diffusers():
    for ours, expected in zip(encode_prompts(MODEL, PROMPTS), theirs(PROMPTS, guided=False), strict=True):
        assert torch.equal(ours, expected)


@torch.no_grad()
@pytest.mark.parametrize("negative", [["", ""], ["a green ring", "at night"]], ids=["empty", "given"])
def test_guidance_rows_equal_diffusers(negative):
    ours = encode_guidance(MODEL, PROMPTS, negative, guided=True)
    if any(negative):  # all in one batch
        expected = theirs(negative + PROMPTS, guided=False)
    else:
        expected = theirs(PROMPTS)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_each_text_is_encoded_once(monkeypatch):
    seen = []

    def encode(model, texts):
        seen.append(texts)
        lengths = torch.tensor([[float(len(text))] for text in texts])
        return lengths[:, None], lengths

    monkeypatch.setattr("runtime.sampling.text.encode_prompts", encode)
    rows, pooled = encode_guidance(MODEL, ["ab", "c", "ab"], ["", "c", ""], guided=True)
    assert seen == [["", "c", "ab"]]
    assert pooled.flatten().tolist() == rows.flatten().tolist() == [0, 1, 0, 2, 1, 2]


@torch.no_grad()
def test_an_empty_negative_prompt_is_encoded_where_the_model_was_trained_so():
    MODEL.force_zeros_for_empty_prompt = False
    try:
        text, _ = encode_guidance(MODEL, PROMPTS[:1], [""], guided=True)
    finally:
        MODEL.force_zeros_for_empty_prompt = True
    assert torch.equal(text[:1], encode_prompts(MODEL, [""])[0])
    assert text[:1].any()


@torch.no_grad()
def test_without_guidance_there_are_only_the_prompts():
    assert len(encode_guidance(MODEL, PROMPTS, ["", ""], guided=False)[0]) == 2


@torch.no_grad()
def test_a_long_prompt_warns_once_and_quotes_what_is_cut():
    long = " ".join(["red"] * 75 + ["purple", "star"])
    with pytest.warns(UserWarning, match=r"79 tokens, expected at most 77; .*'purple star'") as caught:
        text, _ = encode_prompts(MODEL, [long])
    assert len(caught) == 1
    assert torch.equal(text, encode_prompts(MODEL, [" ".join(["red"] * 75)])[0])


@torch.no_grad()
def test_a_prompt_that_just_fits_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompts(MODEL, [" ".join(["red"] * 75)])
