"""Warnings of what a request asks for and no step of it does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.control.keyframes import written
from runtime.control.region import Region

if TYPE_CHECKING:
    from runtime.sampling.request import Request


def warn_of_unused(request: Request) -> None:
    """Warn of regions that act in no step, and of settings of a guidance that no step has."""
    _of_guidance(request)
    _of_regions(request.regions, request.run_steps)


def _of_guidance(request: Request) -> None:
    count, (start, end) = request.run_steps, request.guidance_range
    if any(request.guided_steps(count)):
        return
    if request.guidance > 1 and start < end:
        _warn(
            f"guidance_range {start:g} {end:g}: no whole step of {count} is in it, so the picture has no guidance; "
            "expected a wider one, or more steps"
        )
    given = {"negative_prompt": any(text.strip() for text in request.negatives)}
    given["guidance_rescale"] = request.guidance_rescale != 0
    for name in (name for name, asked in given.items() if asked):
        _warn(f"{name}: no step has guidance, so it does nothing; expected guidance above 1, in some step")


def _of_regions(regions: Sequence[Region], count: int) -> None:
    timed = [region for region in regions if (region.start, region.end) != (0.0, 1.0)]
    if not timed:
        return
    from runtime.control.features import activity  # it imports the kernels

    for region, acts in zip(timed, activity(timed, count).any(dim=0).tolist(), strict=True):
        if not acts:
            lost = "words" if region.condition is None else "control"
            _warn(
                f"{region.label}: start {region.start:g}, end {written(region.end)}: it acts in no step, so the region "
                f"has no {lost}"
            )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)  # where the request is made
