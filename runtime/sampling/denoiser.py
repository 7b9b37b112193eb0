"""The denoiser: what the sampling loop calls at every step, whatever runs underneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.control.features import Control, first_alike
from runtime.control.residuals import Residuals
from runtime.control.words import Words
from runtime.model.unet import UNet
from runtime.sampling.controlnets import ControlNets
from runtime.sampling.deep_cache import DeepCache
from runtime.sampling.rows import repeat_rows
from runtime.sampling.torch_step import Joint, Step, TorchJoint, TorchStep


class Denoiser(Protocol):
    """SDXL's UNet in PyTorch or on an engine.

    device, dtype: what it computes on and in. latent_channels: of its input. control_channels: of the control at each
    level. profile: the sizes it was built for, None for any. most_tokens: of a prompt, most_words: regions with words,
    None for any number. whole_steps: see `capabilities.Capabilities`.
    """

    device: torch.device
    dtype: torch.dtype
    latent_channels: int
    control_channels: Sequence[int]
    profile: Any
    most_tokens: int | None
    most_words: int | None
    whole_steps: str | None

    def prepare(
        self,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        control: Control | None,
        repeat: int,
        cache_interval: int = 1,
        words: Words | None = None,
        residuals: Residuals | None = None,
    ) -> Step:
        """Compute all that is the same at every step; the function returned runs one.

        timesteps: (T,). text (P, S, D), pooled (P, K) and time_ids (P, 6): one row for each prompt of the guidance
        batch, each of which serves `repeat` consecutive rows of the sample. cache_interval: how many steps in a row
        use the same deep features, see `DeepCache`. words: those of regions. residuals: of their ControlNets.
        """

    def joint(self) -> Joint:
        """Return what runs a step of each of several requests, in as few calls as fit, and returns their predictions.

        Each is what its own `Step` gives, but for rounding. What a call has in common with the last one is kept.
        """


class TorchDenoiser:
    """SDXL's UNet in PyTorch."""

    profile = None
    most_tokens = None
    most_words = None
    whole_steps = None

    def __init__(self, unet: UNet, device: torch.device | None = None):
        """device: where it computes, if its weights are not there all the time."""
        self.unet = unet
        self.device, self.dtype = device or unet.conv_in.weight.device, unet.conv_in.weight.dtype

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def control_channels(self) -> Sequence[int]:
        """Return channels of the four feature maps that a control must have."""
        return self.unet.config.control_channels

    def prepare(
        self,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        control: Control | None,
        repeat: int,
        cache_interval: int = 1,
        words: Words | None = None,
        residuals: Residuals | None = None,
    ) -> Step:
        """See `Denoiser.prepare`."""
        dtype = self.dtype
        text = text.to(dtype) if words is None else words.beside(text.to(dtype))
        time = [repeat_rows(t, repeat, dim=1) for t in self.unet.embed_time(timesteps, pooled, time_ids)]
        pairs = [(repeat_rows(k, repeat), repeat_rows(v, repeat)) for k, v in self.unet.project_text(text)]
        nets = None
        if residuals is not None:
            nets = ControlNets(residuals, timesteps, text, pooled, time_ids, repeat, words)
        segments = segments_of(len(timesteps), control, words, residuals)
        cache = DeepCache(self.unet, cache_interval, segments)
        return TorchStep(self.unet, time, pairs, control, words, nets, cache)

    def joint(self) -> Joint:
        """See `Denoiser.joint`."""
        return TorchJoint(self.unet)


def segments_of(steps: int, *given: Control | Words | Residuals | None) -> list[int]:
    """Return for each step the first one with the same control and words."""
    segments = [x.segments for x in given if x is not None]
    return first_alike(torch.tensor(segments).T) if segments else [0] * steps
