"""Pictures of several prompts at once, which AUTOMATIC1111's syntax joins by AND.

At each step the UNet predicts for every prompt, and the guided prediction is u + g sum_k w_k (c_k - u), with u the
negative prompt's prediction, c_k a prompt's, w_k its weight and g the guidance (composable diffusion, arXiv 2206.01714;
stable-diffusion-webui's `combine_denoised`). So c = u + sum_k w_k (c_k - u) is guided as one prompt's prediction is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.text.prompts import split


@dataclass(frozen=True)
class Composition:
    """The prompts that each picture is made of.

    texts: of all prompts, in their order; prompts: the number of the prompt that each is of. owners: the picture that
    each row of a guidance batch after the unguided ones is of; weights: how much it counts there.
    """

    texts: tuple[str, ...]
    prompts: tuple[int, ...]
    owners: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, prompts: Sequence[str], syntax: str, repeat: int) -> Composition:
        """Return that of `repeat` pictures of each prompt."""
        texts, numbers, owners, weights = [], [], [], []
        for i, prompt in enumerate(prompts):
            for text, weight in split(prompt, syntax):
                texts.append(text)
                numbers.append(i)
                owners += range(i * repeat, (i + 1) * repeat)
                weights += [weight] * repeat
        return cls(tuple(texts), tuple(numbers), tuple(owners), tuple(weights))

    @property
    def plain(self) -> bool:
        """Return whether every picture has one prompt, which counts as it is."""
        return len(set(self.owners)) == len(self.owners) and set(self.weights) == {1.0}


class Composer:
    """Makes the rows of a guidance batch of a composition, and one prediction a picture of what comes back."""

    def __init__(self, composition: Composition, device: torch.device):
        owners = torch.tensor(composition.owners)
        self.pictures = int(owners.max()) + 1
        weights = torch.zeros(self.pictures, len(owners))
        weights[owners, torch.arange(len(owners))] = torch.tensor(composition.weights)
        self.owners, self.weights = owners.to(device), weights.to(device)

    def rows(self, sample: Tensor) -> Tensor:
        """Return the UNet's input (B + V, C, h, w) of that of the pictures, (B, C, h, w); V rows have a prompt each."""
        return torch.cat([sample, sample[self.owners]])

    def combine(self, output: Tensor) -> Tensor:
        """Return the predictions without guidance and with it, (2B, C, h, w), of all rows' (B + V, C, h, w)."""
        unguided, guided = output.split([self.pictures, len(self.owners)])
        towards = (guided - unguided[self.owners]).flatten(1)
        composed = torch.addmm(unguided.flatten(1), self.weights, towards)
        return torch.cat([unguided, composed.view_as(unguided)])
