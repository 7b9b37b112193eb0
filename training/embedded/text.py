"""The embedded model's tokenizers and text encoders: CLIP's own classes, over the world's small vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.embedded.world import BACKGROUNDS, COLOURS, SHAPES

WORDS = sorted({*COLOURS, *SHAPES, *BACKGROUNDS, "a", "an", "and", "at", "on", "in"})
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def write_vocabulary(folder: Path) -> Path:
    """Write vocab.json and merges.txt in CLIP's form into ``folder``: every word of the world is one token, any
    other text is spelled in bytes. As in CLIP's, "!" is 0 and the end token is the last id."""
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator([" ".join(WORDS)], trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n"
    )
    return folder


def make_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """SDXL's pair: the first pads with the end token, the second with "!" (id 0). ``folder``: the vocabulary's."""
    return tuple(CLIPTokenizer.from_pretrained(folder, **options) for options in _tokenizer_options())


def write_tokenizers(first: Path, second: Path) -> None:
    """Write SDXL's pair in the files that every version of transformers reads."""
    for folder, options in zip((first, second), _tokenizer_options(), strict=True):
        for leftover in folder.glob("*"):
            leftover.unlink()
        write_vocabulary(folder)
        config = {"tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | options, indent=2) + "\n")


def _tokenizer_options() -> list[dict]:
    return [{"pad_token": pad, "model_max_length": LENGTH} for pad in (END, "!")]


def make_text_encoders(
    vocabulary: int, width: int = 96, layers: int = 3
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's pair in small. The UNet reads the states before the last layer, as SDXL's does."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def tokenize(tokenizers, captions: list[str]) -> list[torch.Tensor]:
    """Return (B, 77) int64 ids for each tokenizer."""
    return [
        t(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        for t in tokenizers
    ]


def encode(text_encoders, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text conditioning: (B, 77, both widths) from the last layer but one, and the second's pooled (B, P)."""
    outputs = [e(i, output_hidden_states=True) for e, i in zip(text_encoders, ids, strict=True)]
    return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[1].text_embeds
