"""How a prompt is written: plain words, or AUTOMATIC1111's syntax of weights; and how it is cut for CLIP's encoders."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from runtime.errors import InputError

SYNTAXES = ("plain", "a1111")
STEP = 1.1  # weight of (a pair of brackets), and of [one] its inverse
BACKTRACK = 20  # tokens: a comma so near to a chunk's end is where a1111 ends it
MOST_CHUNKS = 32
TOKEN = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|\]|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\s*\bBREAK\b\s*", re.DOTALL)
WEIGHTED = re.compile(r"\([^()]+:\s*[+-]?[.\d]+\s*\)|\bBREAK\b|\(\(|\[\[")
AND = re.compile(r"\bAND\b")
SHARE = re.compile(r":\s*([-+]?(?:\d+\.?|\d*\.\d+))$")  # at a whole prompt's end
NETWORK = re.compile(r"<\w+:[^<>]*>")
LORA = "give --lora FILE=WEIGHT"
MARK = re.compile(r"\\.|[()\[\]:|]", re.DOTALL)
MOST_NESTED = 100
MOST_JOINED = 16  # prompts, by AND: each is a row of the UNet
MOST_WEIGHT = 10


class Fragment(NamedTuple):
    """Some words and their weight; `text` None is BREAK: what follows begins a chunk."""

    text: str | None
    weight: float = 1.0


class Chunk(NamedTuple):
    """What an encoder takes at a time: token ids without their start and end, and each one's weight."""

    ids: list[int]
    weights: list[float]


def check_prompt(text: str, syntax: str, name: str = "prompt", joins: bool = False) -> None:
    """Raise InputError where a prompt has what its syntax does not; warn where it seems to be of the other one.

    joins: whether AND may join several in it.
    """
    if syntax == "a1111":
        if found := NETWORK.search(text):
            raise InputError(f"{name}: {found[0]!r} is not read: extra networks; {LORA}")
        if joins:
            _check_joined(text, name)
        elif AND.search(text):
            raise InputError(f"{name}: 'AND' is not read: only the picture's prompt may be of several")
        if found := _changing(text):
            raise InputError(f"{name}: {found!r} is not read: prompts that change from step to step")
        for fragment in parse(text, syntax, name):
            _check_weight(fragment.weight, name)
        return
    for pattern, instead in ((WEIGHTED, "prompt syntax a1111 reads it as weights"), (NETWORK, LORA)):
        if found := pattern.search(text):
            warnings.warn(f"{name}: {found[0]!r} is read as words; {instead}", stacklevel=4)


def _check_joined(text: str, name: str) -> None:
    parts = split(text, "a1111")
    if len(parts) > MOST_JOINED:
        raise InputError(f"{name}: {len(parts)} joined by AND; expected at most {MOST_JOINED}")
    for part in parts:
        _check_weight(part.weight, name)
    if len(parts) == 1 and parts[0].weight != 1:
        warnings.warn(
            f"{name}: {text[len(parts[0].text) :].strip()!r} at its end is a weight, by which guidance is multiplied",
            stacklevel=5,
        )


def _check_weight(weight: float, name: str) -> None:
    if not -MOST_WEIGHT <= weight <= MOST_WEIGHT:
        raise InputError(f"{name}: a weight of {weight:g}; expected {-MOST_WEIGHT} to {MOST_WEIGHT}")


def _changing(text: str) -> str | None:
    """Return the first [from:to:when] or [one|other] in a text, at any depth; within round brackets : is a weight's."""
    opened: list[tuple[str, int]] = []  # each bracket that is open, and where
    changing: set[int] = set()
    for found in MARK.finditer(text):
        mark, at = found[0], found.start()
        if mark in "([":
            opened.append((mark, at))
        elif mark in ":|" and opened:
            changing.add(opened[-1][1])
        elif mark in ")]":
            bracket, start = opened.pop() if opened else ("", 0)
            if bracket + mark == "[]" and start in changing:
                return text[start : at + 1]
            if bracket + mark not in ("()", "[]"):
                opened.clear()  # crossed ones enclose nothing, in stable-diffusion-webui too
    return None


def split(text: str, syntax: str) -> list[Fragment]:
    """Return the prompts that AND joins in one, each with its weight: `a cat AND a dog :0.7`, see `composition`.

    In a1111's syntax, which reads the weight at the end of a single prompt too. The rules are those of
    stable-diffusion-webui's `get_multicond_prompt_list`.
    """
    if syntax == "plain":
        return [Fragment(text)]
    found = []
    for part in map(str.rstrip, AND.split(text)):
        share = SHARE.search(part)
        found.append(Fragment(part[: share.start()].rstrip(), float(share[1])) if share else Fragment(part))
    return found


def parse(text: str, syntax: str, name: str = "prompt") -> list[Fragment]:
    r"""Return a prompt's words with their weights.

    a1111: (words) 1.1, [words] 1 / 1.1, (words:1.3) 1.3, nested ones multiply, \( is a bracket, BREAK ends a chunk. A
    bracket that is not closed ends with the text. The numbers are those of stable-diffusion-webui's
    `parse_prompt_attention`. Raises InputError for more than MOST_NESTED brackets in each other.
    """
    if syntax == "plain":
        return [Fragment(text)]
    found: list[Fragment] = []
    round_, square = [], []  # where the open brackets' words begin

    def multiply(start: int, by: float) -> None:
        found[start:] = [Fragment(t, w * by) for t, w in found[start:]]

    for match in TOKEN.finditer(text):
        token, weight = match[0], match[1]
        if len(round_) + len(square) > MOST_NESTED:
            raise InputError(f"{name}: more than {MOST_NESTED} brackets in each other")
        if token == "(":
            round_.append(len(found))
        elif token == "[":
            square.append(len(found))
        elif weight is not None and round_:
            multiply(round_.pop(), float(weight))
        elif token == ")" and round_:
            multiply(round_.pop(), STEP)
        elif token == "]" and square:
            multiply(square.pop(), 1 / STEP)
        else:
            words = token[1:] if token[0] == "\\" else token
            for i, part in enumerate(BREAK.split(words)):
                found += [Fragment(None)] * (i > 0) + [Fragment(part)]
    for start, by in [(p, STEP) for p in round_] + [(p, 1 / STEP) for p in square]:
        multiply(start, by)
    return _merged(found) or [Fragment("")]


def _merged(fragments: Sequence[Fragment]) -> list[Fragment]:
    """Return neighbours of one weight as one: words are tokenized together."""
    merged: list[Fragment] = []
    for fragment in fragments:
        last = merged[-1] if merged else None
        if last and None not in (last.text, fragment.text) and last.weight == fragment.weight:
            merged[-1] = Fragment(last.text + fragment.text, last.weight)
        else:
            merged.append(fragment)
    return merged


def cut(
    fragments: Sequence[tuple[Sequence[int] | None, float]],
    room: int,
    comma: int | None,
    vectors: Mapping[int, int] = MappingProxyType({}),
) -> list[Chunk]:
    """Return the chunks of at most `room` tokens of fragments, (ids, weight) each, or (None, ...) for BREAK.

    comma: the id of ",": a chunk that is full ends after its last one, if that is within BACKTRACK tokens; None: where
    it is full. vectors: how many tokens a textual inversion is, by the id of its first: they stay in one chunk.
    """
    chunks, ids, weights, last_comma = [], [], [], None

    def end(at: int) -> None:
        nonlocal ids, weights, last_comma
        chunks.append(Chunk(ids[:at], weights[:at]))
        ids, weights, last_comma = ids[at:], weights[at:], None

    for tokens, weight in fragments:
        if tokens is None:
            end(len(ids))
            continue
        for token in tokens:
            full = len(ids) == room
            if token == comma:
                last_comma = len(ids)
            elif full and last_comma is not None and len(ids) - last_comma <= BACKTRACK:
                end(last_comma + 1)
                full = len(ids) == room
            if full:
                end(room)
            if ids and len(ids) + vectors.get(token, 1) > room:
                end(len(ids))
            ids.append(token)
            weights.append(weight)
    if ids or not chunks:
        end(len(ids))
    return chunks
