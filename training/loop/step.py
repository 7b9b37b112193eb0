"""One training step's arithmetic: from a batch to the loss terms of every sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from runtime.control.masks import mask_pyramid
from runtime.loading.load import Model
from runtime.machine.arithmetic import DTYPES
from runtime.model.blocks import Injection
from training.config import TrainConfig
from training.loop.controls import trains_controlnet
from training.loop.frozen import FrozenUNet
from training.loop.loss import add_noise, check_schedule, schedule_of, training_loss


class LossOf:
    """The losses of a batch; differentiable in the weights of what is trained, which are its own dtype's (float32)."""

    def __init__(self, model: Model, config: TrainConfig):
        self.config, self.dtype = config, DTYPES[config.dtype]
        self.unet = FrozenUNet(model.unet, compiled=config.compile)
        self.device = self.unet.device
        self.abar = schedule_of(model.scheduler).to(self.device)  # (T,)
        self.prediction = model.scheduler.config.prediction_type
        self.ones = torch.ones(1, device=self.device)
        check_schedule(self.abar, self.prediction, config)

    def __call__(self, control: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `terms` of the `features` of what is trained. batch: of `data.rows.Rows`."""
        return self.terms(self.features(control, batch), batch)

    def terms(self, features: list[Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weighted terms, (B,) float32 each; see `loss.training_loss`. features: per level, or residuals."""
        batch = self._moved(batch)
        abar = self.abar[batch["t"]]
        noisy, _, _ = add_noise(batch["latents"], batch["noise"], abar)
        sizes = [tuple(f.shape[2:]) for f in features]
        *gates, mask = mask_pyramid(batch["mask"], [*sizes, tuple(noisy.shape[2:])], self.config.mask_resize)
        gates = [None] * len(features) if self.config.control in ("input", "everywhere") else gates
        added = [Injection([f], [gate], self.ones) for f, gate in zip(features, gates, strict=True)]
        control, residuals = (None, added) if trains_controlnet(self.config) else (added, None)
        text = batch["text"], batch["pooled"], batch["time_ids"]
        output = self.unet(noisy, batch["t"], *text, control, residuals)
        return training_loss(
            output,
            noisy,
            batch["latents"],
            batch["noise"],
            mask,
            batch["t"],
            abar,
            self.prediction,
            self.config,
        )

    def features(self, control: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Return a T2I-Adapter's four maps of a batch's conditions, or a ControlNet's residuals, in the frozen model's
        dtype.
        """
        condition = batch["condition"].to(self.device, non_blocking=True)
        condition = condition.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if trains_controlnet(self.config):
                features = self._residuals(control, condition, self._moved(batch))
            else:
                features = control(condition)
        return [f.to(self.unet.dtype, memory_format=torch.channels_last) for f in features]

    def _residuals(self, net: nn.Module, condition: Tensor, batch: Mapping[str, Tensor]) -> list[Tensor]:
        noisy, _, _ = add_noise(batch["latents"], batch["noise"], self.abar[batch["t"]])
        added = {"text_embeds": batch["pooled"].float(), "time_ids": batch["time_ids"]}
        text = batch["text"].float()
        down, mid = net(noisy, batch["t"], text, condition, added_cond_kwargs=added, return_dict=False)
        return [*down, mid]

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch on the device, without the conditions."""
        needed = {name: value for name, value in batch.items() if name != "condition"}
        return {name: value.to(self.device, non_blocking=True) for name, value in needed.items()}
