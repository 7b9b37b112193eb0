"""The VAE's latents and the text encoders' states of what the cache lacks."""

from __future__ import annotations

from collections import defaultdict

import torch

from runtime.errors import InputError
from runtime.loading.load import Model
from runtime.machine.arithmetic import name_of
from runtime.text.encode import Reading, encode_prompts
from training.config import TrainConfig
from training.data.stores import CACHE_DTYPES, Stores, text_key

ENCODE_PIXELS = 4 * 2**20  # through the VAE at once: four pictures of 1024 x 1024
PROMPTS = 32  # through the text encoders at once


class Encoder:
    """Runs the VAE and the text encoders on what the reader found missing, in batches, into the stores."""

    def __init__(self, model: Model, stores: Stores, config: TrainConfig, device: torch.device):
        self.model, self.stores, self.device = model, stores, device
        self.dtype = CACHE_DTYPES[config.cache_dtype]
        # batches are of one length: a long caption is cut, with a warning
        self.reading = Reading(most_tokens=model.tokenizers[0].model_max_length)
        self.images: dict[tuple, list[dict]] = defaultdict(list)
        self.captions: dict[str, None] = {}
        self._want_text("")

    def add(self, item: dict) -> None:
        self._want_text(item["entry"][2])
        for variant in item["variants"]:
            for store, name in ((self.stores.conditions, "condition"), (self.stores.masks, "mask")):
                if name in variant and variant["key"] not in store:
                    store.add(variant["key"], {"png": variant[name]})
            if "pixels" in variant and variant["key"] not in self.stores.latents:
                self._want_latents(variant)

    def finish(self) -> None:
        for variants in self.images.values():
            self._encode_images(variants)
        self._encode_captions()

    def _want_latents(self, variant: dict) -> None:
        shape = variant["pixels"].shape
        if any(v["key"] == variant["key"] for v in self.images[shape]):
            return
        self.images[shape].append(variant)
        if len(self.images[shape]) * shape[1] * shape[2] >= ENCODE_PIXELS:
            self._encode_images(self.images.pop(shape))

    def _want_text(self, caption: str) -> None:
        if text_key(caption) not in self.stores.text:
            self.captions[caption] = None
        if len(self.captions) >= PROMPTS:
            self._encode_captions()

    @torch.inference_mode()
    def _encode_images(self, variants: list[dict]) -> None:
        if not variants:
            return
        vae = self.model.vae
        pixels = torch.stack([v["pixels"] for v in variants]).to(self.device, vae.dtype)
        posterior, rows = vae.encode(pixels / 127.5 - 1).latent_dist, {}
        for variant, mean, std in zip(variants, posterior.mean, posterior.std, strict=True):
            if not mean.isfinite().all():
                raise InputError(f"the VAE's latents are not finite in {vae.dtype}; give --vae one that is")
            rows[variant["key"]] = {
                "mean": self._rounded(mean, "latents"),
                "std": self._rounded(std, "latents"),
                "ids": torch.tensor(variant["ids"]),
            }
        self.stores.latents.add_all(rows)

    @torch.inference_mode()
    def _encode_captions(self) -> None:
        captions, self.captions = list(self.captions), {}
        if captions:
            text, pooled = (
                self._rounded(x, "text") for x in encode_prompts(self.model, captions, self.reading)
            )
            rows = zip(captions, text, pooled, strict=True)
            self.stores.text.add_all({text_key(c): {"states": s, "pooled": p} for c, s, p in rows})

    def _rounded(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """Return them in the cache's type. Raises InputError where that cannot hold them."""
        rounded = values.to(self.dtype)
        if not rounded.isfinite().all():
            largest = values.abs().max().item()
            raise InputError(
                f"cache_dtype {name_of(self.dtype)}: the {what} reach {largest:.3g}, which it cannot hold; use "
                "--cache-dtype bf16 or fp32"
            )
        return rounded
