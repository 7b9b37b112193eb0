"""Prompts to SDXL's text conditioning, once per image."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from runtime.control.region import Region
from runtime.errors import InputError
from runtime.loading.load import Model
from runtime.text.prompts import MOST_CHUNKS, Chunk, cut, parse

# A call sets the padding of the tokenizer's Rust half, which refuses two threads; pipelines may share one.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    syntax: one of `prompts.SYNTAXES`. clip_skip: how many more of the encoders' last layers are left out, beside the
    one that SDXL leaves out. most_tokens: that the denoiser takes; None for any number.
    """

    syntax: str = "plain"
    clip_skip: int = 0
    most_tokens: int | None = None


def encode_prompts(
    model: Model, prompts: Sequence[str], reading: Reading = Reading()
) -> tuple[Tensor, Tensor]:
    """Return the text conditioning of each prompt, as SDXL's UNet takes it.

    Returns the hidden states before both encoders' last layer, side by side, (B, S, D), and the second encoder's
    pooled embedding, (B, P). A prompt that is longer than the encoders take is encoded in chunks, whose states follow
    each other; its pooled embedding is the first one's. S is that of the longest prompt: the others end with the
    states of empty ones. A token's weight multiplies its states, of which the mean is then what it was
    (stable-diffusion-webui's "original" emphasis).

    Warns (UserWarning) where a prompt is longer than `most_tokens`, quoting what is cut. Raises InputError where it has
    more than MOST_CHUNKS chunks, or the encoders fewer layers than `clip_skip`.
    """
    states, pooled = [], None
    device = model.text_encoders[0].device
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        chunks = _chunks(tokenizer, prompts, reading, warn=not states)
        most = max(map(len, chunks))
        rows = [chunk for own in chunks for chunk in (*own, *[Chunk([], [])] * (most - len(own)))]
        hidden, pooled = encode_ids(encoder, _ids(tokenizer, rows).to(device), reading.clip_skip)
        hidden = _weighted(hidden, rows)
        states.append(hidden.reshape(len(prompts), -1, hidden.shape[-1]))
    return torch.cat(states, dim=-1), pooled[::most]  # the second encoder's, of each prompt's first chunk


def encode_ids(encoder: CLIPTextModel, ids: Tensor, clip_skip: int = 0) -> tuple[Tensor, Tensor]:
    """Return the hidden states before the last layer (B, S, D) of token ids (B, S), and a projecting encoder's pooled
    embedding (B, P). clip_skip: see `Reading`."""
    output = encoder(ids, output_hidden_states=True)
    layers = len(output.hidden_states)  # and the embeddings, which are no layer's
    if clip_skip > layers - 2:
        raise InputError(
            f"clip_skip {clip_skip}: a text encoder gives the states of {layers - 1}; expected at most {layers - 2}"
        )
    return output.hidden_states[-2 - clip_skip], output[0]


def encode_guidance(
    model: Model,
    prompts: Sequence[str],
    negative: Sequence[str],
    guided: bool,
    reading: Reading = Reading(),
    beside: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the conditioning of a guidance batch: rows of the negative prompts first, then of the prompts.

    An empty negative prompt is all zeros where the model was trained so (`force_zeros_for_empty_prompt`).
    Without guidance only the prompts' rows. A text that comes several times is encoded once.
    beside: of each prompt, the number of its negative one; by default its own. They are of one length, as in a call of
    their own: the shorter ends with the states of empty chunks. What is shorter than the rest of the batch is repeated,
    see `Words.beside`.
    """
    beside = list(range(len(prompts))) if beside is None else list(beside)
    zero = guided and model.force_zeros_for_empty_prompt
    wanted = [*negative, *prompts] if guided and (any(negative) or not zero) else [*prompts]
    groups = [*range(len(wanted) - len(prompts)), *beside]
    different = list(dict.fromkeys(wanted))
    rows = [different.index(prompt) for prompt in wanted]
    encoded = encode_prompts(model, different, reading)
    text, pooled = (torch.stack([x[row] for row in rows]) for x in encoded)
    text = _as_alone(text, model.tokenizers[0], wanted, groups, reading)
    if zero and not any(negative):
        return tuple(torch.cat([x.new_zeros(len(negative), *x.shape[1:]), x]) for x in (text, pooled))
    for row, prompt in enumerate(negative if zero else ()):
        if not prompt:
            text[row], pooled[row] = 0, 0
    return text, pooled


def _as_alone(
    text: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    groups: Sequence[int],
    reading: Reading,
) -> Tensor:
    """Return states (G, S, D) of prompts, each as long as the longest of its group and repeated to one length for all.

    Attention to a text twice over is attention to it, so a picture does not depend on the others' prompts. Warns
    (UserWarning) where that would take more than MOST_CHUNKS chunks, and leaves the states as they are.
    """
    length = tokenizer.model_max_length
    if text.shape[1] <= length:
        return text
    own = [len(chunks) for chunks in _chunks(tokenizer, prompts, reading, warn=False)]
    longest = {group: max(n for n, g in zip(own, groups, strict=True) if g == group) for group in groups}
    most = math.lcm(*longest.values())
    if most > MOST_CHUNKS:
        sizes = ", ".join(str(n) for n in sorted(set(longest.values())))
        warnings.warn(
            f"prompt: prompts of {sizes} chunks of tokens in one call change each other's pictures; draw them in calls "
            "of their own",
            stacklevel=4,
        )
        return text
    states = [
        row[: longest[g] * length].repeat(most // longest[g], 1) for row, g in zip(text, groups, strict=True)
    ]
    return torch.stack(states)


def encode_words(
    model: Model, regions: Sequence[Region], reading: Reading = Reading(), beside: int = 1
) -> list[Tensor]:
    """Return the states of the words of those regions that have any, (S, D) each.

    One by one: in one batch they would change each other's last bits, and the prompts'. beside: how many tokens the
    prompts' states have, see `_bounded`. Raises InputError, naming the region.
    """
    found = []
    for region in regions:
        if region.prompt is not None:
            try:
                found.append(encode_prompts(model, [region.prompt], reading)[0][0])
            except InputError as error:
                raise InputError(f"{region.label}: {error}") from error
    return _bounded(model, found, beside, reading)


def _bounded(model: Model, words: list[Tensor], beside: int, reading: Reading) -> list[Tensor]:
    """Return states of words which, with those of prompts of `beside` tokens, do not come to gigabytes when they are
    repeated to one length, see `Words.beside`.

    Warns (UserWarning) where they would come to more than MOST_CHUNKS chunks, and ends all but the longest with the
    states of empty chunks.
    """
    length = model.tokenizers[0].model_max_length
    if math.lcm(beside, *map(len, words)) <= MOST_CHUNKS * length:
        return words
    sizes = ", ".join(str(n) for n in sorted({len(states) // length for states in words}))
    warnings.warn(
        f"regions' prompts: of {sizes} chunks of tokens beside the prompt's {beside // length} have no common length; "
        "the shorter ones end with empty chunks, which changes them a little",
        stacklevel=4,
    )
    longest = -(-max(map(len, words)) // beside) * beside
    empty = encode_prompts(model, [""], reading)[0][0]
    return [torch.cat([states, *[empty] * ((longest - len(states)) // length)]) for states in words]


def is_long(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], syntax: str) -> bool:
    """Return whether a prompt takes more than one chunk."""
    return any(len(chunks) > 1 for chunks in _chunks(tokenizer, prompts, Reading(syntax), warn=False))


def _chunks(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], reading: Reading, warn: bool
) -> list[list[Chunk]]:
    """Return each prompt's chunks; warn: of what is cut."""
    length = tokenizer.model_max_length
    room = length - 2  # the start and end tokens
    parsed = [parse(prompt, reading.syntax) for prompt in prompts]
    texts = [fragment.text for fragments in parsed for fragment in fragments if fragment.text is not None]
    with _TOKENIZING:
        ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    vectors = _vectors(tokenizer)
    tokens = iter([[vector for number in row for vector in vectors.get(number, [number])] for row in ids])
    counts = {number: len(own) for number, own in vectors.items()}
    comma = tokenizer.convert_tokens_to_ids(",</w>") if reading.syntax == "a1111" else None
    most = MOST_CHUNKS if reading.most_tokens is None else reading.most_tokens // length
    found = []
    for fragments in parsed:
        ids = [(None if text is None else next(tokens), weight) for text, weight in fragments]
        chunks = cut(ids, room, comma, counts)
        if len(chunks) > most:
            count = sum(len(chunk.ids) for chunk in chunks)
            if reading.most_tokens is None:
                found = f"{count + 2} tokens" if count > most * room else f"{len(chunks)} chunks, by BREAK"
                expected = most * room + 2 if count > most * room else most
                raise InputError(f"prompt: {found}; expected at most {expected}")
            if warn:
                _warn_of_cut(tokenizer, chunks[most:], count + 2, reading.most_tokens)
        found.append(chunks[:most])
    return found


def _vectors(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Return all token ids of each textual inversion, by its first: diffusers calls them <cat>, <cat>_1, ..."""
    added = tokenizer.get_added_vocab()
    vectors = {}
    for token, number in added.items():
        others = (added.get(f"{token}_{i}") for i in range(1, len(added)))
        vectors[number] = [number, *takewhile(lambda other: other is not None, others)]
    return vectors


def _warn_of_cut(tokenizer, left: Sequence[Chunk], count: int, most: int) -> None:
    with _TOKENIZING:
        text = tokenizer.decode([token for chunk in left for token in chunk.ids]).strip()
    warnings.warn(
        f"prompt: {count} tokens, expected at most {most}; this part is ignored: {text!r}", stacklevel=5
    )


def _ids(tokenizer, chunks: Sequence[Chunk]) -> Tensor:
    """Return (B, S) token ids, each chunk between start and end and padded to the tokenizer's length."""
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    length = tokenizer.model_max_length
    return torch.tensor([[start, *c.ids, end, *[pad] * (length - 2 - len(c.ids))] for c in chunks])


def _weighted(states: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """Return states (B, S, D) times their tokens' weights, with each chunk's mean as it was."""
    if all(weight == 1 for chunk in chunks for weight in chunk.weights):
        return states
    length = states.shape[1]
    rows = [[1.0, *c.weights, *[1.0] * (length - 1 - len(c.weights))] for c in chunks]
    weights = torch.tensor(rows, device=states.device)[..., None]
    whole = states.float()
    weighted = whole * weights
    means = (x.mean(dim=(1, 2), keepdim=True) for x in (whole, weighted))
    before, after = means
    return (weighted * (before / after)).to(states.dtype)
