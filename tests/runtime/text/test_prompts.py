"""runtime.text.prompts: stable-diffusion-webui's syntax and chunks, by its own documented values."""

import random

import pytest

from runtime.errors import InputError
from runtime.text.prompts import BACKTRACK, Fragment, check_prompt, cut, parse, split

COMMA = 7

# The examples of parse_prompt_attention's own docstring.
DOCUMENTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", DOCUMENTED)
def test_weights_are_as_documented(text):
    found = parse(text, "a1111")
    assert [f.text for f in found] == [t for t, _ in DOCUMENTED[text]]
    assert [f.weight for f in found] == pytest.approx([w for _, w in DOCUMENTED[text]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1)]),
        ("a BREAK b", [("a", 1), (None, 1), ("b", 1)]),
        ("BREAKING news", [("BREAKING news", 1)]),
        ("(a:1.5)(b:0.5)", [("a", 1.5), ("b", 0.5)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("time 10:30)", [("time 10:30)", 1)]),
        ("a:b", [("a:b", 1)]),
        ("[[a]]", [("a", 1 / 1.1**2)]),
        ("()", [("", 1)]),
        ("\\", [("", 1)]),  # as webui drops it
        (r"a \\ b", [("a \\ b", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
    ],
)
def test_corners(text, expected):
    found = parse(text, "a1111")
    assert [f.text for f in found] == [t for t, _ in expected]
    assert [f.weight for f in found] == pytest.approx([w for _, w in expected])


def test_plain_words_are_left_as_they_are():
    text = r"a (red:1.3) [car] \( BREAK AND"
    assert parse(text, "plain") == [Fragment(text)]


def test_any_text_is_parsed_and_no_word_lost():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("ab ()[]\\:1.5,") for _ in range(rng.randrange(30)))
        words = "".join(f.text or "" for f in parse(text, "a1111"))
        assert [c for c in words if c in "ab"] == [c for c in text if c in "ab"]


@pytest.mark.parametrize("text", ["a (red:1.3) car", "((red)) car", "a BREAK b", "[[red]]"])
def test_weights_in_plain_words_are_warned_of(text):
    with pytest.warns(UserWarning, match="prompt syntax a1111 reads it as weights"):
        check_prompt(text, "plain")


def test_extra_networks_in_plain_words_are_warned_of():
    with pytest.warns(UserWarning, match="'<lora:x:0.8>' is read as words; give --lora FILE=WEIGHT"):
        check_prompt("<lora:x:0.8> a cat", "plain")


@pytest.mark.parametrize("text", ["a car (red)", "10:30", "a [b]", "broken"])
def test_brackets_alone_are_words(text, recwarn):
    check_prompt(text, "plain")
    assert not recwarn


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a cat AND a dog", "'AND' is not read: only the picture's prompt may be of several"),
        ("<lora:x:0.8> a cat", "'<lora:x:0.8>' is not read: extra networks; give --lora"),
        ("a [cat:dog:0.5]", "'[cat:dog:0.5]' is not read: prompts that change"),
        ("a [cat|dog]", "prompts that change"),
        ("a [cat:(dog:1.2):0.5]", "'[cat:(dog:1.2):0.5]' is not read: prompts that change"),
        ("a ([cat:dog:0.5]:1.3)", "'[cat:dog:0.5]' is not read: prompts that change"),
        ("((a [cat|dog]))", "'[cat|dog]' is not read: prompts that change"),
        ("a [[cat]:(\\(dog:1.1):5]", "prompts that change"),
        ("(a" * 200, "more than 100 brackets in each other"),
        ("(cat:100)", "a weight of 100; expected -10 to 10"),
    ],
)
def test_what_is_not_read_is_refused(text, said):
    with pytest.raises(InputError) as caught:
        check_prompt(text, "a1111", "negative_prompt")
    assert str(caught.value).startswith("negative_prompt: ") and said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["(a [b:1.2) c]", r"[a\:b\|c]", "[(a:1.2) b]", "a: [b] | c", "([a] b: c)", "[a (b: c]", "[a:b", "a:b]"],
)
def test_weights_and_crossed_brackets_are_no_change(text):
    check_prompt(text, "a1111")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a cat AND a dog", [("a cat", 1), (" a dog", 1)]),
        ("a cat :1.2 AND a dog AND a fish :-.5 ", [("a cat", 1.2), (" a dog", 1), (" a fish", -0.5)]),
        ("(a cat:1.2) AND BANDANA", [("(a cat:1.2)", 1), (" BANDANA", 1)]),
        ("a: b AND 16:9", [("a: b", 1), (" 16", 9)]),
        ("a :2. AND", [("a", 2), ("", 1)]),
    ],
)
def test_prompts_are_split_as_webui_does(text, parts):
    assert split(text, "a1111") == parts and split(text, "plain") == [(text, 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" AND ".join("a" * 17), "17 joined by AND; expected at most 16"),
        ("a AND b :11", "a weight of 11; expected -10 to 10"),
        ("a AND <lora:x:0.8>", "extra networks"),
    ],
)
def test_joined_prompts_that_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        check_prompt(text, "a1111", joins=True)


def test_a_single_prompts_weight_is_told_of():
    with pytest.warns(
        UserWarning, match="prompt: ':1.5' at its end is a weight, by which guidance is multiplied"
    ):
        check_prompt("a cat :1.5", "a1111", joins=True)


def test_chunks_are_full_and_keep_the_order():
    (first, second, third) = cut([(range(100, 175), 1.0), (range(175, 260), 0.5)], 75, None)
    assert first.ids == list(range(100, 175)) and set(first.weights) == {1.0}
    assert second.ids == list(range(175, 250)) and third.ids == list(range(250, 260))
    assert set(second.weights) == {0.5}


@pytest.mark.parametrize(("back", "length"), [(1, 75), (BACKTRACK, 56), (BACKTRACK + 1, 75)])
def test_a_full_chunk_ends_after_a_near_comma(back, length):
    """As webui does: where the comma is at most 20 tokens before what does not fit any more."""
    ids = list(range(100, 200))
    ids[75 - back] = COMMA
    chunks = cut([(ids, 1.0)], 75, COMMA)
    assert [len(c.ids) for c in chunks] == [length, 100 - length]
    assert [i for c in chunks for i in c.ids] == ids


def test_break_ends_a_chunk():
    chunks = cut([([1, 2], 1.0), (None, 1.0), ([3], 2.0)], 75, None)
    assert [(c.ids, c.weights) for c in chunks] == [([1, 2], [1.0, 1.0]), ([3], [2.0])]
    assert cut([([], 1.0)], 75, None) == [([], [])]


@pytest.mark.parametrize(
    "text", ["[(cat:1.3)]", "[blurry, (bad hands:1.2)]", r"\[a:b\]", "((a)) [b]", "(a:1.2)|b"]
)
def test_weights_in_square_brackets_are_read(text):
    check_prompt(text, "a1111")
