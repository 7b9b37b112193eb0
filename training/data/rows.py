"""Training samples from the cache: which sample comes when, and everything random about it.

Everything follows from the seed and a sample's number in the run (its slot), whichever process draws it: a resumed
run takes the steps it would have taken, and two processes with a batch of 4 take those of one with a batch of 8, or
of one that adds up two batches of 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime.control.adapters import fit_channels
from training.config import TrainConfig
from training.data import workers
from training.data.masks import random_mask, segment_mask
from training.data.reader import decode_png
from training.data.stores import Entry, Stores, row_key, text_key

Slot = tuple[int, int]  # number in the run, row of the entries


class Plan:
    """The samples of each optimizer step over all processes, without end; those of a step share a bucket.

    An epoch shows each entry once; a bucket's last step is filled up with its first samples.
    """

    def __init__(self, buckets: list[tuple[int, int]], samples: int, seed: int):
        self.samples, self.seed = samples, seed
        rows = defaultdict(list)
        for row, bucket in enumerate(buckets):
            rows[bucket].append(row)
        self.rows = [np.array(rows[bucket]) for bucket in sorted(rows)]
        self.per_epoch = sum(-(-len(r) // samples) for r in self.rows)
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __getitem__(self, number: int) -> list[Slot]:
        """Return the slots of step `number`."""
        epoch, position = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        first = number * self.samples
        return [(first + i, int(row)) for i, row in enumerate(self._epoch[1][position])]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for rows in self.rows:
            count = -(-len(rows) // self.samples)
            batches += np.split(np.resize(rng.permutation(rows), count * self.samples), count)
        return [batches[i] for i in rng.permutation(len(batches))]


class Part(Sampler):
    """A process's batches, `accumulate` of them for each of the plan's steps, from step `first` on."""

    def __init__(self, plan: Plan, first: int, part: int, parts: int, accumulate: int = 1):
        self.plan, self.first, self.part, self.parts, self.accumulate = plan, first, part, parts, accumulate

    def __iter__(self) -> Iterator[list[Slot]]:
        batches = self.parts * self.accumulate
        size = self.plan.samples // batches
        for number in count(self.first):
            slots = self.plan[number]
            for i in range(self.part, batches, self.parts):
                yield slots[i * size : (i + 1) * size]


class Rows(Dataset):
    """What one slot trains on; see `__getitem__`.

    timesteps: of the model's noise schedule. scaling: of its VAE's latents. channels: that the adapter reads, 1 or 3.
    """

    def __init__(
        self,
        entries: list[Entry],
        stores: Stores,
        config: TrainConfig,
        timesteps: int,
        scaling: float,
        channels: int,
    ):
        self.entries, self.stores, self.config = entries, stores, config
        self.timesteps, self.scaling, self.channels = timesteps, scaling, channels

    def __getitem__(self, slot: Slot) -> dict[str, Tensor]:
        """latents, noise (4, h, w) float32; condition (C, H, W), mask (1, H, W) float32; text (S, D), pooled (P,);
        time_ids (6,) float32; t () int64."""
        number, row = slot
        entry, config = self.entries[row], self.config
        rng = np.random.default_rng([config.seed, 1, number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        key = row_key(entry.key, int(rng.integers(config.crops)))
        latents = self.stores.latents.get(key)
        mean, std = latents["mean"].float(), latents["std"].float()
        drop = rng.random() < config.prompt_drop
        # before the mask, which draws more or fewer numbers: methods with other masks see the same timesteps
        t = timestep(float(rng.random()), self.timesteps, config.timesteps)
        text = self.stores.text.get(text_key("" if drop else entry.caption))
        condition, mask = self.control(entry, key, rng)
        return {
            "latents": (mean + std * torch.randn(mean.shape, generator=generator)) * self.scaling,
            "noise": torch.randn(mean.shape, generator=generator),
            "condition": condition,
            "mask": mask,
            "text": text["states"],
            "pooled": text["pooled"],
            "time_ids": latents["ids"].float(),
            "t": torch.tensor(t),
        }

    def control(self, entry: Entry, key: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the condition (C, H, W) as the adapter is to see it, and the mask (1, H, W)."""
        condition = fit_channels(decode_png(self.stores.conditions.get(key)), self.channels)[0]
        if self.config.control == "everywhere":
            return condition, torch.ones(1, *entry.bucket)
        mask = self._mask(entry, key, rng)
        return (condition * mask if self.config.control == "input" else condition), mask

    def _mask(self, entry: Entry, key: str, rng: np.random.Generator) -> Tensor:
        if self.stores.masks is None:
            return random_mask(rng, *entry.bucket, self.config)[0]
        stored = decode_png(self.stores.masks.get(key))
        return (
            segment_mask(rng, stored, self.config) if self.config.mask_kind == "segmentation" else stored
        )[0]


def make_loader(rows: Rows, plan: Plan, first: int, part: int, parts: int, pin: bool) -> DataLoader:
    """Return a process's batches of the plan's steps, from step `first` on, without end."""
    sampler = Part(plan, first, part, parts, rows.config.accumulate)
    return DataLoader(rows, batch_sampler=sampler, pin_memory=pin, **workers.options(rows.config.workers))


def timestep(u: float, count: int, sampling: str) -> int:
    """Return a timestep in [0, count) from u in [0, 1): "uniform", or "cubic", (1 - u^3) T, more of the noisy ones."""
    share = u if sampling == "uniform" else 1 - u**3
    return min(int(share * count), count - 1)
