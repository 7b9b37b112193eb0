"""Prompts to SDXL's text conditioning, once per image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel

from runtime.engine_model import EngineTextEncoder
from runtime.loading import Model


def encode_prompts(model: Model, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The text conditioning of each prompt, as SDXL's UNet takes it.

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


def encode_ids(encoder: CLIPTextModel | EngineTextEncoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, S) -> hidden states before the last layer (B, S, D), and a projecting encoder's pooled (B, P)."""
    if isinstance(encoder, EngineTextEncoder):
        return encoder.encode(ids)
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def encode_guidance(
    model: Model, prompts: Sequence[str], negative: Sequence[str], guided: bool
) -> tuple[Tensor, Tensor]:
    """The conditioning of a guidance batch: rows of the negative prompts first, then of the prompts.

    An empty negative prompt is all zeros where the model was trained so (`force_zeros_for_empty_prompt`).
    Without guidance only the prompts' rows.
    """
    text, pooled = encode_prompts(model, prompts)
    if not guided:
        return text, pooled
    if model.force_zeros_for_empty_prompt and not any(negative):
        unguided = torch.zeros_like(text), torch.zeros_like(pooled)
    else:
        unguided = encode_prompts(model, negative)
    return torch.cat([unguided[0], text]), torch.cat([unguided[1], pooled])


def _tokenize(tokenizer, prompts: Sequence[str], warn: bool) -> Tensor:
    """(B, S) token ids, padded and cut to the tokenizer's length."""
    length = tokenizer.model_max_length
    if warn:
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            room = length - 2  # the start and end tokens
            if len(ids) > room:
                cut = tokenizer.decode(ids[room:]).strip()
                warnings.warn(
                    f"prompt: {len(ids) + 2} tokens, expected at most {length}; this part is ignored: {cut!r}",
                    stacklevel=2,
                )
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
