"""Prompt encoding: against diffusers' own, the guidance batch, and what is said of a prompt that is too long."""

import warnings

import pytest
import torch

from runtime.control.region import Region
from runtime.errors import InputError
from runtime.loading.load import from_diffusers
from runtime.text.encode import Reading, encode_guidance, encode_prompts, encode_words
from tests.support.tiny import make_pipeline
from tests.support.tolerances import assert_close, relative_rms

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

    def encode(model, texts, reading):
        seen.append(texts)
        lengths = torch.tensor([[float(len(text))] for text in texts])
        return lengths[:, None], lengths

    monkeypatch.setattr("runtime.text.encode.encode_prompts", encode)
    rows, pooled = encode_guidance(MODEL, ["ab", "c", "ab"], ["", "c", ""], guided=True)
    assert seen == [["", "c", "ab"]]
    assert pooled.flatten().tolist() == rows.flatten().tolist() == [0, 1, 0, 2, 1, 2]


@torch.no_grad()
def test_an_empty_negative_prompt_is_zeros_whatever_the_others_are():
    MODEL.force_zeros_for_empty_prompt = True
    mixed = encode_guidance(MODEL, PROMPTS, ["", "a green ring"], guided=True)
    for x, alone in zip(mixed, encode_prompts(MODEL, ["a green ring", *PROMPTS]), strict=True):
        assert not x[0].any() and relative_rms(x[1:], alone) < 1e-6


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
def test_what_a_denoiser_does_not_take_is_cut_and_quoted_once():
    long = " ".join(["red"] * 75 + ["purple", "star"])
    with pytest.warns(UserWarning, match=r"79 tokens, expected at most 77; .*'purple star'") as caught:
        text, _ = encode_prompts(MODEL, [long], Reading(most_tokens=77))
    assert len(caught) == 1
    assert torch.equal(text, encode_prompts(MODEL, [" ".join(["red"] * 75)])[0])


@torch.no_grad()
def test_a_prompt_that_just_fits_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompts(MODEL, [" ".join(["red"] * 75)])


WORDS = ["red", "circle", "blue", "star", "green"]


@torch.no_grad()
@pytest.mark.parametrize("count", [76, 150, 151, 200])
def test_a_long_prompt_is_encoded_in_chunks_of_75_tokens(count):
    """As compel does with truncate_long_prompts=False (2.3.1, equal to the bit when this was written)."""
    words = (WORDS * 60)[:count]
    text, pooled = encode_prompts(MODEL, [" ".join(words), "red"])
    parts = [encode_prompts(MODEL, [" ".join(words[i : i + 75])]) for i in range(0, count, 75)]
    assert_close("states", text[:1], torch.cat([part for part, _ in parts], dim=1))
    assert_close("states", pooled[:1], parts[0][1])
    short, empty = (encode_prompts(MODEL, [x])[0] for x in ("red", ""))
    assert_close("states", text[1:], torch.cat([short, *[empty] * (len(parts) - 1)], dim=1))


@torch.no_grad()
def test_weights_multiply_states_and_keep_their_mean():
    """stable-diffusion-webui's EmphasisOriginal, spelled out for each encoder."""
    plain, pooled = encode_prompts(MODEL, ["a red circle"])
    ours, our_pooled = encode_prompts(MODEL, ["a (red:1.5) circle"], Reading("a1111"))
    weights = torch.ones(77)
    weights[2] = 1.5  # start, a, red
    expected = []
    for z in plain.split([e.config.hidden_size for e in MODEL.text_encoders], dim=-1):
        weighted = z * weights[:, None]
        expected.append(weighted * (z.mean() / weighted.mean()))
    assert_close("states", ours, torch.cat(expected, dim=-1))
    assert torch.equal(our_pooled, pooled)


@torch.no_grad()
def test_brackets_without_weights_change_nothing():
    for a, b in zip(
        encode_prompts(MODEL, [r"a \(red\) circle"], Reading("a1111")), encode_prompts(MODEL, ["a (red) circle"]),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)


@torch.no_grad()
def test_clip_skip_is_diffusers():
    ours = encode_prompts(MODEL, PROMPTS, Reading(clip_skip=1))
    text, _, pooled, _ = PIPE.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, device="cpu", clip_skip=1
    )
    assert torch.equal(ours[0], text) and torch.equal(ours[1], pooled)
    with pytest.raises(InputError, match="clip_skip 9: a text encoder gives the states of"):
        encode_prompts(MODEL, PROMPTS, Reading(clip_skip=9))


@torch.no_grad()
def test_a_prompt_without_end_is_refused():
    with pytest.raises(InputError, match="prompt: 5002 tokens; expected at most 2402"):
        encode_prompts(MODEL, ["red " * 5000])
    with pytest.raises(InputError, match="prompt: 40 chunks, by BREAK; expected at most 32"):
        encode_prompts(MODEL, ["BREAK " * 40], Reading("a1111"))


@torch.no_grad()
def test_prompts_of_any_length_are_as_in_calls_of_their_own():
    """A call of one: a shorter negative prompt is filled up to it. Beside others: repeated."""
    prompts = [" ".join(WORDS * n) for n in (1, 20, 40)]  # of 1, 2 and 3 chunks
    negatives = ["at night", "", " ".join(WORDS * 35)]  # 1, 1 and 3
    text, pooled = encode_guidance(MODEL, prompts, negatives, guided=True)
    assert text.shape[1] == 6 * 77
    for i, chunks in enumerate((1, 2, 3)):
        own, own_pooled = encode_guidance(MODEL, prompts[i : i + 1], negatives[i : i + 1], guided=True)
        assert own.shape[1] == chunks * 77
        assert_close("states", text[[i, i + 3]], own.repeat(1, 6 // chunks, 1))
        assert_close("pooled", pooled[[i, i + 3]], own_pooled)


@torch.no_grad()
def test_prompts_joined_by_and_are_of_one_length():
    """Both are beside the first negative prompt; the last one by itself."""
    prompts = ["red", " ".join(WORDS * 20), "blue"]
    text, _ = encode_guidance(MODEL, prompts, ["at night", "day"], True, beside=[0, 0, 1])
    first, _ = encode_guidance(MODEL, prompts[:2], ["at night"], True, beside=[0, 0])
    assert_close("states", text[[0, 2, 3]], first)
    own, _ = encode_guidance(MODEL, prompts[2:], ["day"], True)
    assert_close("states", text[[1, 4]], own.repeat(1, 2, 1))


@torch.no_grad()
def test_lengths_that_do_not_go_together_are_told_of():
    with pytest.warns(UserWarning, match="prompts of 5, 7 chunks of tokens in one call change each other"):
        text, _ = encode_guidance(MODEL, [" ".join(WORDS * n) for n in (70, 100)], ["", ""], guided=False)
    assert text.shape[1] == 7 * 77


@torch.no_grad()
def test_words_of_regions_come_to_a_bounded_length_beside_the_prompt():
    """Of 5, 7 and 8 chunks the least common multiple is 280, which SDXL's layers would fill 46 GB with."""
    texts = [" ".join(WORDS * n) for n in (100, 120)]
    alone = [encode_prompts(MODEL, [text])[0][0] for text in (*texts, "")]
    regions = [Region(prompt=text, label="region") for text in texts]
    with pytest.warns(UserWarning, match="of 7, 8 chunks of tokens beside the prompt's 5"):
        words = encode_words(MODEL, regions, beside=5 * 77)
    assert [len(states) for states in words] == [10 * 77] * 2
    assert_close("words", words[0], torch.cat([alone[0], *[alone[2]] * 3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = encode_words(MODEL, regions[:1], beside=2 * 77)
    assert torch.equal(words[0], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_textual_inversion_has_all_its_vectors(vectors):
    """diffusers' own call puts <cat>, <cat>_1 and <cat>_2 in place of <cat>."""
    pipe = make_pipeline()
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):
        width = encoder.get_input_embeddings().embedding_dim
        pipe.load_textual_inversion(
            torch.randn(vectors, width), token="<cat>", text_encoder=encoder, tokenizer=tokenizer
        )
    expected, _, pooled, _ = pipe.encode_prompt(
        "a <cat> and a star", do_classifier_free_guidance=False, device="cpu"
    )
    found = encode_prompts(from_diffusers(pipe), ["a <cat> and a star"])
    assert torch.equal(found[0], expected) and torch.equal(found[1], pooled)


@torch.no_grad()
@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_the_vectors_of_a_textual_inversion_stay_in_one_chunk(syntax):
    """As stable-diffusion-webui has it: the chunk before ends where there is no room for all of them."""
    pipe = make_pipeline()
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):
        width = encoder.get_input_embeddings().embedding_dim
        pipe.load_textual_inversion(
            torch.randn(4, width), token="<cat>", text_encoder=encoder, tokenizer=tokenizer
        )
    model = from_diffusers(pipe)
    for words, cut in ((71, "<cat> BREAK blue"), (72, "BREAK <cat> blue"), (74, "BREAK <cat> blue")):
        found = encode_prompts(model, ["red " * words + "<cat> blue"], Reading(syntax))[0]
        expected = encode_prompts(model, ["red " * words + cut], Reading("a1111"))[0]
        assert torch.equal(found, expected)
