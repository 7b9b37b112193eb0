"""What is drawn before the first picture, so that it does not wait for what a step of its kind waits for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from runtime.control.region import Region
from runtime.sampling.request import Request


def rehearsals(request: Request, size: tuple[int, int], controlnets: Collection[str]) -> list[Request]:
    """Return requests that have a step of every kind which a request has, with and without guidance, and no more.

    One without regions; one with its words, and one with its words and ControlNets, where it has such. size: height
    and width of its pictures. controlnets: the names of those that there are.
    """
    kinds = sorted(set(request.guided_steps(request.run_steps)), reverse=True)  # the guided first
    once = {"steps": len(kinds), "guidance_range": (0.0, sum(kinds) / len(kinds)), "scheduler": "euler"}
    once |= {"height": size[0], "width": size[1], "seed": 0, "latents": None, "cache_interval": 1}
    once |= {"image": None, "strength": 1.0, "generator": None, "outside": "free", "reference": None}
    words = [Region(prompt=text, label=f"region {i + 1}") for i, text in enumerate(request.words)]
    names = {r.adapter for r in request.regions if r.condition is not None} & set(controlnets)
    black = torch.zeros(1, 1, *size)
    nets = [Region(black, adapter=name, label=name) for name in sorted(names)]
    return [
        replace(request, **once, regions=regions)
        for regions in ([], *filter(None, (words, words + nets if nets else [])))
    ]
