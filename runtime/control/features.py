"""The control that the features of T2I-Adapters exert on the UNet.

`Control` holds the features of every region, run once per image, with each region's mask at the maps' sizes and its
strength at every step: the gated features are G_l = sum_r s_r * m_r^l * F_r^l.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import T2IAdapter
from torch import Tensor

from kernels import ops
from runtime.control.masks import mask_pyramid
from runtime.control.region import PackedRegion, Region
from runtime.loading.adapter import check_adapter, fit_channels
from runtime.model.blocks import LevelControl


class Control:
    """What a picture's regions add to the UNet, at each level and step.

    features: for each level, R tensors (1, C_l, h_l, w_l). masks: for each level, R tensors (1, 1, h_l, w_l) float32,
    each or all of them None for "everywhere". strengths: (steps, levels, R) float32 on the CPU; kept on `device`.
    """

    def __init__(
        self,
        features: Sequence[Sequence[Tensor]],
        masks: Sequence[Sequence[Tensor | None] | None],
        strengths: Tensor,
        device: str | torch.device = "cpu",
    ):
        self.features, self.masks, self.strengths = features, masks, strengths.to(device)
        first: dict[tuple, int] = {}
        rows = strengths.flatten(1).tolist()
        # for each step, the first one at which every strength is the same
        self.segments = [first.setdefault(tuple(row), step) for step, row in enumerate(rows)]
        self._gated: tuple[int, list[Tensor]] = (-1, [])  # segment and sums of the last call

    @classmethod
    def build(
        cls,
        packed: Sequence[PackedRegion],
        adapters: Mapping[str, T2IAdapter],
        steps: int,
        *,
        device: str | torch.device,
        dtype: torch.dtype,
        channels: Sequence[int],
        mode: str = "area",
    ) -> "Control | None":
        """Run every region's adapter, once for all regions that show the same condition to the same adapter.

        channels: the features' channels that the UNet expects at each level. mode: how masks are resized, "area" or
        "nearest". Returns None where there is no region.

        Raises InputError for an unknown adapter, or one whose channels do not fit the UNet.
        """
        if not packed:
            return None
        for name in dict.fromkeys(item.region.adapter for item in packed):
            check_adapter(name, adapters, channels)
        done, features, masks = {}, [], []
        strength = strengths([item.region for item in packed], steps)
        for r, item in enumerate(packed):
            adapter = adapters[item.region.adapter]
            condition = fit_channels(item.condition, adapter.config.in_channels)
            if hasattr(adapter, "gated"):  # a compiled one: it gates its features itself
                sizes = adapter.sizes(condition)
                scales = item.region.scale * torch.tensor(item.region.levels)
                features.append(adapter.gated(condition, _masks(item.mask, sizes, device, mode), scales))
                masks.append([None] * len(sizes))
                strength[:, :, r] = activity([item.region], steps)
                continue
            # equal conditions are told by identity; a blanked one is its region's own
            shown = item if item.region.mask_condition else item.region.condition
            key = id(adapter), id(shown)
            if key not in done:
                computed = adapter(condition.to(device, dtype))
                done[key] = [f.contiguous(memory_format=torch.channels_last) for f in computed]
            features.append(done[key])
            masks.append(_masks(item.mask, [tuple(f.shape[2:]) for f in done[key]], device, mode))
        by_level = (list(zip(*regional, strict=True)) for regional in (features, masks))
        return cls(*by_level, strength, device)

    def at(self, step: int) -> list[LevelControl]:
        """One step's features, masks and scales (R,), level by level, as `kernels.ops.inject` takes them."""
        return list(zip(self.features, self.masks, self.strengths[step], strict=True))

    def gated(self, step: int) -> list[Tensor]:
        """G_l = sum_r s_r * m_r^l * F_r^l of one step, (1, C_l, h_l, w_l) for each level, in float32.

        Summed once for all steps of a segment, so that a step costs the same for any number of regions.
        """
        if self._gated[0] != self.segments[step]:
            self._gated = self.segments[step], [_sum(*level) for level in self.at(step)]
        return self._gated[1]


def _sum(features: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor) -> Tensor:
    zeros = torch.zeros_like(features[0], dtype=torch.float32, memory_format=torch.channels_last)
    return ops.inject(zeros, features, masks, scales, inplace=True)


def _masks(
    mask: Tensor | None, sizes: Sequence[tuple[int, int]], device: str | torch.device, mode: str
) -> list[Tensor | None]:
    """A region's mask at the size of each of its features."""
    return [None] * len(sizes) if mask is None else mask_pyramid(mask.to(device), sizes, mode)


def strengths(regions: Sequence[Region], steps: int) -> Tensor:
    """Each region's strength at each step and level: (steps, levels, R) float32, 0 where it does not act."""
    scales = torch.tensor([[region.scale * level for level in region.levels] for region in regions])
    return activity(regions, steps)[:, None] * scales.T


def activity(regions: Sequence[Region], steps: int) -> Tensor:
    """Whether each region acts at each step: (steps, R).

    Region r acts in step i of n where start <= i / n and (i + 1) / n <= end, as in diffusers' ControlNet pipelines.
    """
    return torch.tensor(
        [[r.start <= i / steps and (i + 1) / steps <= r.end for r in regions] for i in range(steps)]
    )
