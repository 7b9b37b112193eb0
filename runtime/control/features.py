"""The control that the features of T2I-Adapters exert on the UNet.

`Control` holds the features of every region, run once per image, with each region's mask at the maps' sizes and its
strength at every step: the gated features are G_l = sum_r s_r * m_r^l * F_r^l.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels import ops
from runtime.control.adapters import Adapter, check_adapter, fit_channels, same_condition
from runtime.control.keyframes import over_steps
from runtime.control.masks import mask_pyramid
from runtime.control.region import PackedRegion, Region
from runtime.control.rows import channels_last, in_halves, per_picture
from runtime.model.blocks import Injection


class Control:
    """What a picture's regions add to the UNet, at each level and step.

    features: for each level, R tensors (B, C_l, h_l, w_l). masks: for each level, R tensors (B, 1, h_l, w_l) float32,
    each or all of them None for "everywhere". B is 1 where they are the same for all pictures, else `images`.
    strengths: (steps, levels, R) float32 on the CPU; kept on `device`. unguided: likewise, of the rows before the last
    `images` ones, which are not guided.
    """

    def __init__(
        self,
        features: Sequence[Sequence[Tensor]],
        masks: Sequence[Sequence[Tensor | None] | None],
        strengths: Tensor,
        device: str | torch.device = "cpu",
        unguided: Tensor | None = None,
        images: int = 1,
    ):
        self.features, self.masks, self.strengths = features, masks, strengths.to(device)
        differs, self.images = unguided is not None and not torch.equal(unguided, strengths), images
        self.unguided = unguided.to(device) if differs else None
        self.segments = first_alike(torch.cat([strengths, unguided], dim=2) if differs else strengths)
        self._gated: tuple[tuple[int, bool], list[Tensor]] = ((-1, False), [])  # sums of the last call

    @classmethod
    def build(
        cls,
        packed: Sequence[PackedRegion],
        adapters: Mapping[str, Adapter],
        steps: int,
        *,
        device: str | torch.device,
        dtype: torch.dtype,
        channels: Sequence[int],
        mode: str = "area",
        images: int = 1,
    ) -> "Control | None":
        """Run every region's adapter, once for all regions that show it the same condition.

        channels: the features' channels that the UNet expects at each level. mode: how masks are resized, "area" or
        "nearest". Returns None where no region has a condition.

        Raises InputError for an unknown adapter, or one whose channels do not fit the UNet.
        """
        packed = [item for item in packed if item.condition is not None]
        if not packed:
            return None
        for name in dict.fromkeys(item.region.adapter for item in packed):
            check_adapter(name, adapters, channels)
        shown: list[tuple[Adapter, Tensor, list[Tensor]]] = []  # what each run of an adapter saw and gave
        features, masks = [], []
        for item in packed:
            adapter = adapters[item.region.adapter]
            condition = fit_channels(item.condition, adapter.config.in_channels)
            found = (
                maps for other, seen, maps in shown if other is adapter and same_condition(seen, condition)
            )
            maps = next(found, None)
            if maps is None:
                maps = [per_picture(f, images) for f in _run(adapter, condition.to(device, dtype))]
                shown.append((adapter, condition, maps))
            features.append(maps)
            mask = None if item.mask is None else per_picture(item.mask, images)
            masks.append(_masks(mask, [tuple(f.shape[2:]) for f in maps], device, mode))
        by_level = (list(zip(*regional, strict=True)) for regional in (features, masks))
        regions = [item.region for item in packed]
        both = strengths(regions, steps), strengths(regions, steps, unguided=True)
        return cls(*by_level, both[0], device, both[1], images)

    def at(self, step: int) -> list[Injection]:
        """Return one step's features, masks and scales (R,), level by level, as `kernels.ops.inject` takes them."""
        return list(map(Injection, self.features, self.masks, self.strengths[step]))

    def gated(self, step: int, rows: int = 1) -> list[Tensor]:
        """Return G_l = sum_r s_r * m_r^l * F_r^l of one step, (B, C_l, h_l, w_l) for each level.

        In the features' dtype; summed in float32, once for all steps of a segment: a step then reads one map a level
        for any number of regions, the fewest bytes there can be. rows: of the guidance batch; where its unguided half
        has another strength, there are as many maps. Otherwise row i of them is given map i % B.
        """
        halves = self.unguided is not None and rows > self.images
        if self._gated[0] != (self.segments[step], halves):
            sums = [_sum(*level) for level in self.at(step)]
            if halves:
                free = map(_sum, self.features, self.masks, self.unguided[step])
                sums = [in_halves(*pair, rows, self.images) for pair in zip(free, sums, strict=True)]
            self._gated = (self.segments[step], halves), sums
        return self._gated[1]


def _run(adapter: Adapter, condition: Tensor) -> list[Tensor]:
    """Return an adapter's features (N, C_l, h_l, w_l) of conditions (N, C, H, W), run one by one: as of each alone."""
    found = [adapter(one) for one in condition.split(1)]
    return [channels_last(torch.cat(level)) for level in zip(*found, strict=True)]


def _sum(features: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor) -> Tensor:
    rows = max(len(x) for x in (*features, *masks) if x is not None)
    zeros = channels_last(torch.zeros(rows, *features[0].shape[1:], device=features[0].device))
    return ops.inject(zeros, features, masks, scales, inplace=True).to(features[0].dtype)


def _masks(
    mask: Tensor | None, sizes: Sequence[tuple[int, int]], device: str | torch.device, mode: str
) -> list[Tensor | None]:
    """Return a region's mask at the size of each of its features."""
    return [None] * len(sizes) if mask is None else mask_pyramid(mask.to(device), sizes, mode)


def strengths(regions: Sequence[Region], steps: int, unguided: bool = False) -> Tensor:
    """Return each region's strength at each step and level: (steps, levels, R) float32, 0 where it does not act.

    unguided: in the unguided half of a guidance batch.
    """
    scales = torch.tensor([over_steps(region.scale, steps) for region in regions]).T * activity(
        regions, steps
    )
    if unguided:
        scales = scales * torch.tensor([region.uncond_scale for region in regions])
    levels = torch.tensor([region.levels for region in regions])
    return scales[:, None] * levels.T


def acting_steps(packed: Sequence[PackedRegion], steps: int) -> list[list[int]]:
    """Return the steps, from 0, in which each region does something: its control, its words, or both."""
    found = []
    for region, mask in ((item.region, item.mask) for item in packed):
        weights = torch.zeros(steps)
        if region.condition is not None and any(region.levels):
            weights = torch.tensor(over_steps(region.scale, steps)).abs()
        if region.prompt is not None:
            weights = weights + torch.tensor(over_steps(region.prompt_weight, steps))
        if mask is not None and not mask.any():
            weights = torch.zeros(steps)
        found.append((weights * activity([region], steps)[:, 0]).nonzero()[:, 0].tolist())
    return found


def first_alike(settings: Tensor) -> list[int]:
    """Return for each step the first one whose settings (steps, ...) are the same."""
    first: dict[tuple, int] = {}
    return [first.setdefault(tuple(row), step) for step, row in enumerate(settings.flatten(1).tolist())]


def activity(regions: Sequence[Region], steps: int) -> Tensor:
    """Return how much of its strength each region has at each step: (steps, R) float32, 0 where it does not act.

    Region r acts in step i of n where start <= i / n and (i + 1) / n <= end, as in diffusers' ControlNet pipelines; one
    that no whole step fits into acts in the step at its middle, unless start == end. It acts with its whole strength,
    unless its end is keyframes.
    """
    rows = torch.zeros(steps, len(regions))
    for r, region in enumerate(regions):
        fades = not isinstance(region.end, float)
        start, end = region.start, 1.0 if fades else region.end
        acting = [i for i in range(steps) if start <= i / steps and (i + 1) / steps <= end]
        if not acting and start < end:
            acting = [min(int((start + end) / 2 * steps), steps - 1)]
        rows[acting, r] = torch.tensor(over_steps(region.end, steps))[acting] if fades else 1.0
    return rows
