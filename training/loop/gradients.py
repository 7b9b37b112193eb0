"""The gradients of a step, within the memory that there is: activations are recomputed where it does not suffice."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.errors import InputError
from training.config import TrainConfig
from training.loop.controls import trains_controlnet
from training.loop.step import LossOf


class Gradients:
    """Adds up an adapter's gradients; all processes of a run have the same memory for it, or do the same about it."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        loss_of: LossOf,
        adapter: nn.Module,
        optimizer: Optimizer,
    ):
        """adapter, optimizer: as the accelerator has prepared them."""
        self.config, self.accelerator, self.loss_of = config, accelerator, loss_of
        self.adapter, self.optimizer = adapter, optimizer

    def of(self, parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Add up the gradients of a step's batches; return their mean terms.

        Where memory runs out on any process, all of them start again from the first batch.
        """
        total = {}
        for i, batch in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.adapter):
                part = self._unet_gradients(batch)
                if part is None:
                    break
                terms, features, gradients = part
                if not self._add(features, gradients):
                    break
            for name, value in terms.items():
                total[name] = total.get(name, 0) + value / len(parts)
        else:
            return total
        self._free()
        self._make_room(batch)
        return self.of(parts)

    def _add(self, features: list[Tensor], gradients: tuple[Tensor, ...]) -> bool:
        """Add up the adapter's gradients; return whether memory sufficed. Of several processes, all wait in here."""
        try:
            torch.autograd.backward(features, gradients)
        except torch.OutOfMemoryError:
            if self.accelerator.num_processes > 1:
                raise
            return False
        return True

    def _unet_gradients(self, batch: Mapping[str, Tensor]) -> tuple[dict, list[Tensor], tuple] | None:
        """Return the mean terms, the adapter's features and the gradients by them; None if a process lacks the memory.

        Nearly all memory is the UNet's. No process waits for another in its passes, so that one that runs out of
        memory does not leave the others waiting; the adapter's backward, in which they wait, comes after all agree.
        """
        try:
            part = self._try_unet(batch)
        except torch.OutOfMemoryError:
            part = None  # outside of the handler, whose traceback holds on to the memory
        return part if largest(self.accelerator, int(part is None)) == 0 else None

    def _try_unet(self, batch: Mapping[str, Tensor]) -> tuple[dict, list[Tensor], tuple]:
        features = self.loss_of.features(self.adapter, batch)
        leaves = [f.detach().requires_grad_() for f in features]
        terms = {name: value.mean() for name, value in self.loss_of.terms(leaves, batch).items()}
        loss = sum(terms.values()) / self.config.accumulate
        scaler = self.accelerator.scaler
        gradients = torch.autograd.grad(scaler.scale(loss) if scaler else loss, leaves)
        return {name: value.detach() for name, value in terms.items()}, features, gradients

    def _make_room(self, batch: Mapping[str, Tensor]) -> None:
        """Have activations recomputed from now on. Raises InputError where that is not allowed, or done already."""
        if self.config.checkpointing != "auto" or self.loss_of.unet.checkpointing:
            self._too_large(batch)
        self.accelerator.print("out of memory: recomputing activations from now on (--checkpointing on)")
        recompute(self.loss_of, self.accelerator.unwrap_model(self.adapter), self.config)

    def _too_large(self, batch: Mapping[str, Tensor]) -> None:
        """Say which batch would fit: the largest that goes through, by halving."""
        fits, fails = 0, len(batch["t"])
        while fails - fits > 1:
            size = (fits + fails) // 2
            if self._unet_gradients({name: value[:size] for name, value in batch.items()}):
                fits = size
            else:
                fails = size
            self._free()
        said = f"the largest that fits is {fits}" if fits else "not even one sample fits"
        raise InputError(f"batch {self.config.batch}: out of memory; {said} (--accumulate makes up for it)")

    def _free(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def recompute(loss_of: LossOf, adapter: nn.Module, config: TrainConfig) -> None:
    """Have activations recomputed: the UNet's, and a ControlNet's."""
    loss_of.unet.checkpointing = True
    if trains_controlnet(config):
        adapter.enable_gradient_checkpointing()


def largest(accelerator: Accelerator, number: int) -> int:
    """Return the largest number of all processes."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
