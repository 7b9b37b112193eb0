"""The control that ControlNets exert on the UNet.

A ControlNet runs at every step in which one of its regions acts. What it adds to a skip tensor, or to the mid block, is
gated by the masks at that tensor's size: x_i + sum_n (sum_r s_r * m_r^i) R_n,i over the nets n and their regions r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from runtime.control.adapters import fit_channels, same_condition
from runtime.control.features import first_alike, strengths
from runtime.control.masks import mask_pyramid
from runtime.control.region import PackedRegion, Region
from runtime.control.rows import in_halves, over_rows, per_picture
from runtime.model.blocks import Injection
from runtime.model.controlnet import ControlNet


class Run:
    """One ControlNet that is shown one condition, and the regions that it acts in.

    condition: what the net makes of it, (B, C, h, w). masks: of the regions, (B, 1, H, W) float32, None for everywhere.
    B is 1 where they are the same for all pictures.
    """

    def __init__(self, net: ControlNet, condition: Tensor, shown: Tensor):
        """shown: the picture itself."""
        self.net, self.condition, self.shown = net, condition, shown
        self.regions: list[Region] = []
        self.masks: list[Tensor | None] = []
        self._sized: dict[tuple[int, int], list[Tensor | None]] = {}  # masks, by size

    def gate(self, scales: Tensor, size: tuple[int, int], mode: str) -> Tensor:
        """Return sum_r s_r * m_r at one size, (B, 1, h, w); scales: (R,)."""
        if size not in self._sized:
            self._sized[size] = [None if m is None else mask_pyramid(m, [size], mode)[0] for m in self.masks]
        gate = torch.zeros(1, 1, *size)
        for scale, mask in zip(scales.tolist(), self._sized[size], strict=True):
            gate = gate + (scale if mask is None else scale * mask)
        return gate


class Residuals:
    """What ControlNets add to the UNet, at each tensor and step.

    images: how many pictures are drawn; of a guidance batch they are the last rows. mode: how masks are resized, see
    `mask_pyramid`. scales: of each run (steps, levels, R) float32, R its regions; unguided: likewise, of the rows
    before the pictures'. segments: for each step the first one with the same strengths.
    """

    def __init__(self, runs: Sequence[Run], steps: int, device: str | torch.device, mode: str, images: int):
        self.runs, self.device, self.mode, self.images = runs, device, mode, images
        self.scales = [strengths(run.regions, steps) for run in runs]
        self.unguided = [strengths(run.regions, steps, unguided=True) for run in runs]
        self.segments = first_alike(torch.cat([*self.scales, *self.unguided], dim=2))
        self._gates: tuple[int, dict[tuple, Tensor]] = (-1, {})  # of one segment, by run, level and size

    @classmethod
    def build(
        cls,
        packed: Sequence[PackedRegion],
        controlnets: Mapping[str, ControlNet],
        steps: int,
        *,
        device: str | torch.device,
        mode: str = "area",
        images: int = 1,
    ) -> Residuals | None:
        """Embed every region's condition, once for all regions that show a ControlNet the same one.

        None where no region acts through a ControlNet anywhere at any step.
        """
        runs: list[Run] = []
        for item in packed:
            region = item.region
            if item.mask is not None and not item.mask.any():
                continue
            if not strengths([region], steps).any():
                continue
            net = controlnets[region.adapter]
            shown = fit_channels(item.condition, net.config.conditioning_channels)
            run = next((run for run in runs if run.net is net and same_condition(run.shown, shown)), None)
            if run is None:
                run = Run(net, per_picture(net.embed_condition(shown.to(device)), images), shown)
                runs.append(run)
            run.regions.append(region)
            run.masks.append(None if item.mask is None else per_picture(item.mask, images))
        return cls(runs, steps, device, mode, images) if runs else None

    def acting(self, step: int) -> list[int]:
        """Return the numbers of the runs that act at a step."""
        return [i for i, scales in enumerate(self.scales) if scales[step].any()]

    def injections(self, step: int, found: Mapping[int, Sequence[Tensor]]) -> list[Injection] | None:
        """Return what to add to each skip tensor and to the mid block, as `UNet.forward` takes it.

        found: by the number of each acting run what its ControlNet gave: of all tensors, or of the first ones. None
        where no run acts.
        """
        if not found:
            return None
        one = torch.ones(len(found), device=self.device)
        return [
            Injection(
                residuals, [self._gate(i, step, place, r) for i, r in zip(found, residuals, strict=True)], one
            )
            for place, residuals in enumerate(zip(*found.values(), strict=True))
        ]

    def _gate(self, number: int, step: int, place: int, residual: Tensor) -> Tensor:
        """Return a run's gate at the size of one of its residuals. Kept for all steps of a segment."""
        segment, known = self._gates
        if segment != self.segments[step]:
            known = {}
            self._gates = self.segments[step], known
        run, size = self.runs[number], tuple(residual.shape[2:])
        block = (*run.net.config.skip_blocks, -1)[place]  # the mid block's level is the last
        guided, unguided = (scales[number][step, block] for scales in (self.scales, self.unguided))
        halves = len(residual) > self.images and not torch.equal(guided, unguided)
        key = number, block, size, len(residual)
        if key not in known:
            gate = run.gate(guided, size, self.mode)
            if halves:
                gate = in_halves(run.gate(unguided, size, self.mode), gate, len(residual), self.images)
            elif len(gate) > 1:
                gate = over_rows(gate, len(residual))
            known[key] = gate.to(self.device)
        return known[key]
