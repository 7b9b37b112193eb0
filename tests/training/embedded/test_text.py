"""The small vocabulary in CLIP's form."""

import pytest

from training.embedded.text import (
    LENGTH,
    WORDS,
    encode,
    make_text_encoders,
    make_tokenizers,
    tokenize,
    write_vocabulary,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return make_tokenizers(write_vocabulary(tmp_path_factory.mktemp("vocabulary")))


def test_every_word_of_the_world_is_one_token(tokenizers):
    for word in [*WORDS, ","]:
        assert len(tokenizers[0].tokenize(word)) == 1, word
    assert len({tokenizers[0].tokenize(word)[0] for word in WORDS}) == len(WORDS)


@pytest.mark.parametrize("text", ["hello, world!", "élan 漢字 🙂", "'quoted' (x) 12"])
def test_any_other_text_is_spelled_out(tokenizers, text):
    ids = tokenizers[0](text, add_special_tokens=False).input_ids
    assert tokenizers[0].eos_token_id not in ids
    assert tokenizers[0].decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_padding_is_as_sdxls(tokenizers):
    first, second = tokenize(tokenizers, ["a red circle", ""])
    assert first.shape == second.shape == (2, LENGTH)
    end = len(tokenizers[0]) - 1
    assert first[0].tolist()[:5] == second[0].tolist()[:5]
    assert first[0, 4:].tolist() == [end] * (LENGTH - 4)
    assert second[0, 4] == end
    assert second[0, 5:].tolist() == [0] * (LENGTH - 5)


def test_conditioning_has_both_encoders_widths(tokenizers):
    encoders = make_text_encoders(len(tokenizers[0]), width=16, layers=2)
    text, pooled = encode(encoders, tokenize(tokenizers, ["a red circle", ""]))
    assert text.shape == (2, LENGTH, 32)
    assert pooled.shape == (2, 16)
