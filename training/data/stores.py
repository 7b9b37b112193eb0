"""What the cache of a run holds: the stores, their settings, and the keys of their rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from runtime.control.conditions import depth_model_digest
from runtime.loading.load import Model
from runtime.loading.weights import weights_digest
from runtime.machine.files import read_json
from training.config import TrainConfig
from training.data.cache import Store, digest

CACHE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """A sample that can be trained on: its files' key, its caption and its bucket (height, width)."""

    name: str
    key: str
    caption: str
    bucket: tuple[int, int]


@dataclass
class Stores:
    """What is kept: "latents" (mean, std, ids), "text" (states, pooled), "conditions" (png), "masks" (png)."""

    latents: Store
    text: Store
    conditions: Store
    masks: Store | None

    @classmethod
    def open(cls, folder: Path, config: TrainConfig, model: Model) -> Stores:
        crops = {
            "resolution": config.resolution, "buckets": config.buckets, "bucket_step": config.bucket_step,
            "max_aspect": config.max_aspect, "crops": config.crops, "flip": config.flip,
        }  # fmt: skip
        vae = {"vae": weights_digest(model.vae), "dtype": config.cache_dtype}
        if config.flip:  # rows of mirrored crops had other ids before this was noted
            vae |= {"corners": "in the mirrored image"}
        text = {
            "text_encoders": weights_digest(*model.text_encoders), "dtype": config.cache_dtype,
            "tokenizers": digest(*map(_tokenizer_facts, model.tokenizers)),
        }  # fmt: skip
        shown = crops | {"condition": "ready" if config.condition_from else config.condition}
        by = (depth_model_digest() or _only_model(folder, shown)) if shown["condition"] == "depth" else None
        shown |= {"model": by} if by else {}
        return cls(
            Store(folder, "latents", crops | vae),
            Store(folder, "text", text),
            Store(folder, "conditions", shown),
            Store(folder, "masks", crops | {"kind": config.mask_kind}) if config.mask_from else None,
        )

    def all(self) -> list[Store]:
        return [
            store for store in (self.latents, self.text, self.conditions, self.masks) if store is not None
        ]

    def lacking(self, entries: list[Entry], crops: int) -> list[str]:
        """Return what is not there, in words: the kinds of which rows are missing."""
        keys = {row_key(e.key, v) for e in entries for v in range(crops)}
        text = {text_key(""), *(text_key(e.caption) for e in entries)}
        wanted = [(store, text if store is self.text else keys) for store in self.all()]
        absent = ((store.kind, sum(key not in store for key in keys)) for store, keys in wanted)
        return [f"{count} {kind}" for kind, count in absent if count]


def _only_model(folder: Path, settings: Mapping[str, object]) -> str | None:
    """Return the depth model whose conditions the cache has: where all is there, a machine needs no model."""
    models = set()
    for path in folder.glob("conditions-*/settings.json"):
        theirs = read_json(path)
        if settings.items() <= theirs.items():
            models.add(theirs.get("model"))
    return models.pop() if len(models) == 1 else None


def row_key(key: str, variant: int) -> str:
    return f"{key}-{variant}"


def text_key(caption: str) -> str:
    return digest(caption)


def _tokenizer_facts(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what decides the tokens that a tokenizer makes of a text."""
    own = json.loads(tokenizer.backend_tokenizer.to_str())
    of_last_call = ("padding", "truncation")
    kept = {name: value for name, value in own.items() if name not in of_last_call}
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length
    return json.dumps([kept, ends], sort_keys=True)
