"""Words of regions: inside its mask a region's words take the place of the prompt's.

Every cross-attention attends to the prompt and to each region's words, and mixes the results by the masks at its size:
o = s_0 o_0 + sum_r s_r o_r with the shares s_r = w_r / max(1, sum_r w_r), w_r = m_r * prompt_weight_r, and
s_0 = 1 - sum_r s_r for the prompt. Where a mask is 0 exactly nothing of its words is in the result. Where masks
overlap, they share by their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.control.features import activity, first_alike
from runtime.control.keyframes import over_steps
from runtime.control.masks import mask_pyramid
from runtime.control.region import PackedRegion
from runtime.control.rows import over_rows, per_picture


class Words:
    """The words of a picture's regions, and where they take the prompt's place.

    states: the text encoders', R of (S_r, D). masks: R of (B, 1, H, W) float32, None for everywhere; B is 1 where they
    are the same for all pictures. weights: (steps, R), 0 where a region does not act. images: how many pictures are
    drawn; of a guidance batch they are the last rows. mode: how masks are resized, see `masks.mask_pyramid`.
    """

    def __init__(
        self,
        states: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        weights: Tensor,
        images: int,
        mode: str = "area",
    ):
        self.states, self.masks, self.weights, self.images, self.mode = states, masks, weights, images, mode
        self.texts = 1 + len(masks)  # the prompt and the regions' words
        self.segments = first_alike(weights)
        self._sized: dict[tuple[int, int], Tensor] = {}  # masks (B, R, h, w), by size
        self._shares: tuple[int, dict[tuple, Tensor]] = (-1, {})  # of one segment, by size and rows

    @classmethod
    def build(
        cls,
        packed: Sequence[PackedRegion],
        states: Sequence[Tensor],
        steps: int,
        images: int,
        mode: str = "area",
    ) -> Words | None:
        """Return the words of those regions that have any, whose states are given in their order.

        None where none of them acts anywhere at any step.
        """
        spoken = [item for item in packed if item.region.prompt is not None]
        regions = [item.region for item in spoken]
        weights = activity(regions, steps)
        weights = (
            weights * torch.tensor([over_steps(r.prompt_weight, steps) for r in regions]).reshape(-1, steps).T
        )
        acting = [
            i
            for i, item in enumerate(spoken)
            if weights[:, i].any() and (item.mask is None or item.mask.any())
        ]
        if not acting:
            return None
        masks = [m if (m := spoken[i].mask) is None else per_picture(m, images) for i in acting]
        return cls([states[i] for i in acting], masks, weights[:, acting], images, mode)

    @classmethod
    def none(cls, steps: int) -> Words:
        """Return those of no region, for a UNet that takes some."""
        return cls([], [], torch.zeros(steps, 0), 0)

    def beside(self, text: Tensor, texts: int | None = None) -> Tensor:
        """Return the prompts' states (G, S, D) and beside each the regions', (G, 1 + R, S, D).

        A shorter text is repeated, to the least common multiple of all lengths: attention to a text twice over is
        attention to it. texts: how many there are to be; those that are missing are zeros.
        """
        length = math.lcm(text.shape[1], *(len(states) for states in self.states))
        rows = [states.to(text).expand(len(text), -1, -1) for states in self.states]
        both = torch.stack([x.repeat(1, length // x.shape[1], 1) for x in (text, *rows)], dim=1)
        return both if texts is None else F.pad(both, (0, 0, 0, 0, 0, texts - self.texts))

    def shares(self, step: int, height: int, width: int, rows: int, device, dtype: torch.dtype) -> Tensor:
        """Return what each text counts at each position in one step, (rows, 1 + R, height, width).

        The rows before the pictures', which are the negative prompts', are all their own. Kept for all steps of a
        segment.
        """
        segment, known = self._shares
        if segment != self.segments[step]:
            known = {}
            self._shares = self.segments[step], known
        key = height, width, rows
        if key not in known:
            found = over_rows(self._mix(step, height, width), self.images)
            free = found.new_zeros(rows - self.images, *found.shape[1:])
            free[:, 0] = 1
            known[key] = torch.cat([free, found]).to(device, dtype)
        return known[key]

    def _mix(self, step: int, height: int, width: int) -> Tensor:
        """Return the shares of a picture's texts, (B, 1 + R, height, width)."""
        if not self.masks:
            return torch.ones(1, 1, height, width)
        if (height, width) not in self._sized:
            ones = torch.ones(1, 1, height, width)
            sized = [
                ones if m is None else mask_pyramid(m, [(height, width)], self.mode)[0] for m in self.masks
            ]
            self._sized[height, width] = torch.cat(torch.broadcast_tensors(*sized), dim=1)
        wanted = self._sized[height, width] * self.weights[step][:, None, None]
        own = wanted / wanted.sum(1, keepdim=True).clamp_min(1)
        return torch.cat([(1 - own.sum(1, keepdim=True)).clamp_min(0), own], dim=1)
