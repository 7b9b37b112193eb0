"""The denoiser: what the sampling loop calls at every step, whatever runs underneath."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from runtime.adapter import Control
from runtime.unet import UNet

# (sample (G*B, C, h, w), index of the step) -> prediction (G*B, C, h, w) float32
Step = Callable[[Tensor, int], Tensor]


class TorchDenoiser:
    """SDXL's UNet in PyTorch."""

    def __init__(self, unet: UNet):
        self.unet = unet

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def control_channels(self) -> Sequence[int]:
        """Channels of the four feature maps that a control must have."""
        return self.unet.config.control_channels

    def prepare(
        self,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        control: Control | None,
        repeat: int,
    ) -> Step:
        """Compute all that is the same at every step; the function returned runs one.

        timesteps: (T,). text (P, S, D), pooled (P, K) and time_ids (P, 6): one row for each prompt of the guidance
        batch, each of which serves `repeat` consecutive rows of the sample.
        """
        dtype = self.unet.conv_in.weight.dtype
        time = [_repeat(t, repeat, dim=1) for t in self.unet.embed_time(timesteps, pooled, time_ids)]
        keys_values = [
            (_repeat(k, repeat), _repeat(v, repeat)) for k, v in self.unet.project_text(text.to(dtype))
        ]

        def step(sample: Tensor, index: int) -> Tensor:
            at = control.at(index) if control is not None else None
            return self.unet(sample.to(dtype), [t[index] for t in time], keys_values, at).float()

        return step


def _repeat(tensor: Tensor, times: int, dim: int = 0) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=dim)
