"""Prompts to SDXL's text conditioning, once per image."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel

from runtime.loading.load import Model

# A call sets the padding of the tokenizer's Rust half, which refuses two threads; pipelines may share one.
_TOKENIZING = threading.Lock()


def encode_prompts(model: Model, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the text conditioning of each prompt, as SDXL's UNet takes it.

    Returns the hidden states before both encoders' last layer, side by side, (B, S, D), and the second encoder's
    pooled embedding, (B, P). Warns (UserWarning) where a prompt is longer than the encoders take, quoting what is cut.
    """
    states, pooled = [], None
    device = model.text_encoders[0].device
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        ids = _tokenize(tokenizer, prompts, warn=not states)
        hidden, pooled = encode_ids(encoder, ids.to(device))  # the second encoder's pooled embedding is kept
        states.append(hidden)
    return torch.cat(states, dim=-1), pooled


def encode_ids(encoder: CLIPTextModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states before the last layer (B, S, D) of token ids (B, S), and a projecting encoder's pooled
    embedding (B, P)."""
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def encode_guidance(
    model: Model, prompts: Sequence[str], negative: Sequence[str], guided: bool
) -> tuple[Tensor, Tensor]:
    """Return the conditioning of a guidance batch: rows of the negative prompts first, then of the prompts.

    An empty negative prompt is all zeros where the model was trained so (`force_zeros_for_empty_prompt`).
    Without guidance only the prompts' rows. A text that comes several times is encoded once.
    """
    zeros = guided and model.force_zeros_for_empty_prompt and not any(negative)
    wanted = [*negative, *prompts] if guided and not zeros else prompts
    different = list(dict.fromkeys(wanted))
    rows = [different.index(prompt) for prompt in wanted]
    text, pooled = (torch.stack([x[row] for row in rows]) for x in encode_prompts(model, different))
    if zeros:
        text, pooled = (torch.cat([torch.zeros_like(x), x]) for x in (text, pooled))
    return text, pooled


def _tokenize(tokenizer, prompts: Sequence[str], warn: bool) -> Tensor:
    """Return (B, S) token ids, padded and cut to the tokenizer's length."""
    with _TOKENIZING:
        return _tokens(tokenizer, prompts, warn)


def _tokens(tokenizer, prompts: Sequence[str], warn: bool) -> Tensor:
    length = tokenizer.model_max_length
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    full = tokens.attention_mask.all(dim=1).tolist()
    for prompt in (prompt for prompt, is_full in zip(prompts, full, strict=True) if warn and is_full):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        room = length - 2  # the start and end tokens
        if len(ids) > room:
            cut = tokenizer.decode(ids[room:]).strip()
            warnings.warn(
                f"prompt: {len(ids) + 2} tokens, expected at most {length}; this part is ignored: {cut!r}",
                stacklevel=2,
            )
    return tokens.input_ids
