"""Step caching: deep features of the UNet that serve several steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from runtime.model.blocks import Injection, KeyValue, SharedText
from runtime.model.unet import UNet
from runtime.sampling.controlnets import ControlNets


class DeepCache:
    """A UNet that computes its deep features at every `interval`-th step only (arXiv 2312.00858).

    They are also computed anew where the control's strengths or the regions' words are others than at the step they
    come from, and where guidance begins or ends.
    """

    def __init__(self, unet: UNet, interval: int, segments: Sequence[int]):
        """segments: for each step, the first one with the same control and words."""
        self.unet, self.interval, self.segments = unet, interval, segments
        self.deep: Tensor | None = None
        self.computed_at = 0

    def __call__(
        self,
        index: int,
        sample: Tensor,
        time: Sequence[Tensor],
        text: Sequence[KeyValue | SharedText],
        control: Sequence[Injection] | None,
        nets: ControlNets | None = None,
    ) -> Tensor:
        """Return the prediction of step `index`; nets: the ControlNets beside the UNet; the others: see
        `UNet.forward`."""
        shallow = self._fits(len(sample), index)
        residuals = None if nets is None else nets(sample, index, shallow)
        if shallow:
            return self.unet.forward_shallow(sample, time, text, control, self.deep, residuals)
        if self.interval == 1:
            return self.unet(sample, time, text, control, residuals)
        time, text = iter(time), iter(text)
        self.deep, skips = self.unet.deep_features(sample, time, text, control, residuals)
        self.computed_at = index
        return self.unet.finish(self.deep, skips, time, text)

    def _fits(self, rows: int, index: int) -> bool:
        if self.deep is None or len(self.deep) != rows or index - self.computed_at >= self.interval:
            return False
        return self.segments[index] == self.segments[self.computed_at]
