"""Parts of a model that wait in main memory while others work on the GPU: less of its memory, more time.

"model": text encoders, UNet and VAE take turns. "group": so do the UNet's layers, one copied while another computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from runtime.errors import InputError
from runtime.loading.load import Model

OFFLOADS = ("model", "group")


def check_offload(how: str | None, device: torch.device) -> None:
    """Raise InputError where `how` is unknown, or `device` is not a GPU."""
    if how is None:
        return
    if how not in OFFLOADS:
        raise InputError(f"offload {how!r}: unknown, expected {', '.join(OFFLOADS)}")
    if device.type != "cuda":
        raise InputError(f"offload {how}: it saves a GPU's memory, and the device is {device}; leave it out")


def whole_steps(how: str | None) -> str | None:
    """See `capabilities.Capabilities`: in a "group" layers take turns in an order that is fixed at the first step."""
    return "offload group" if how == "group" else None


class Offload:
    """Brings the parts of a model, all of it in main memory, to a device for as long as they work."""

    def __init__(self, model: Model, device: torch.device, how: str, nets: Iterable[nn.Module] = ()):
        """how: one of OFFLOADS. A "group" UNet stays in main memory, and its layers come one by one.

        nets: ControlNets, which take their turn with the UNet; those beside a "group" one are on the device.
        """
        self.device, self.how, self.whole_steps = device, how, whole_steps(how)
        self._turn = (
            threading.RLock()
        )  # a stage may ask for another one: a step's caller that decodes its latents
        self.parts = {"text": model.text_encoders, "denoise": (model.unet, *nets), "decode": (model.vae,)}
        if how == "group":
            self.parts["denoise"] = ()
            streams = device.type == "cuda"
            apply_group_offloading(model.unet, device, offload_type="leaf_level", use_stream=streams)

    @contextmanager
    def at_work(self, stage: str) -> Iterator[None]:
        """Have the stage's modules on the device in this block, one thread at a time.

        Back costs no copy: nothing changes a weight.
        """
        with self._turn, self._on_device(stage):
            yield

    @contextmanager
    def _on_device(self, stage: str) -> Iterator[None]:
        waiting = [(tensor, tensor.data) for module in self.parts[stage] for tensor in _tensors(module)]
        with torch.inference_mode(False):
            for tensor, data in waiting:
                tensor.data = data.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, data in waiting:
                tensor.data = data


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
