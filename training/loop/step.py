"""One training step's arithmetic: from a batch to the loss terms of every sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import T2IAdapter
from torch import Tensor, nn

from runtime.control.masks import mask_pyramid
from runtime.loading.load import Model
from runtime.machine.arithmetic import DTYPES
from runtime.model.blocks import Injection
from training.config import TrainConfig
from training.loop.frozen import FrozenUNet
from training.loop.loss import add_noise, check_schedule, training_loss


class LossOf:
    """The losses of a batch; differentiable in the adapter's weights, which are its own dtype's (float32)."""

    def __init__(self, model: Model, config: TrainConfig):
        self.config, self.dtype = config, DTYPES[config.dtype]
        self.unet = FrozenUNet(model.unet, compiled=config.compile)
        self.device = self.unet.device
        self.prediction = model.scheduler.config.prediction_type
        self.abar = model.scheduler.alphas_cumprod.float().to(self.device)  # (T,)
        self.ones = torch.ones(1, device=self.device)
        check_schedule(self.abar, self.prediction, config)

    def __call__(self, adapter: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `terms` of the adapter's `features`. batch: of `data.rows.Rows`."""
        return self.terms(self.features(adapter, batch), batch)

    def terms(self, features: list[Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weighted terms, (B,) float32 each; see `loss.training_loss`. features: per level."""
        needed = {name: value for name, value in batch.items() if name != "condition"}
        batch = {name: value.to(self.device, non_blocking=True) for name, value in needed.items()}
        abar = self.abar[batch["t"]]
        noisy, _, _ = add_noise(batch["latents"], batch["noise"], abar)
        height, width = noisy.shape[2:]
        sizes = [tuple(f.shape[2:]) for f in features]
        *gates, mask = mask_pyramid(batch["mask"], [*sizes, (height, width)], self.config.mask_resize)
        gates = gates if self.config.control == "features" else [None] * len(features)
        control = [Injection([f], [gate], self.ones) for f, gate in zip(features, gates, strict=True)]
        output = self.unet(noisy, batch["t"], batch["text"], batch["pooled"], batch["time_ids"], control)
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

    def features(self, adapter: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the adapter's four maps of a batch's conditions, in the frozen model's dtype."""
        condition = batch["condition"].to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = adapter(condition.contiguous(memory_format=torch.channels_last))
        return [f.to(self.unet.dtype, memory_format=torch.channels_last) for f in features]


def new_adapter(channels: tuple[int, ...], condition_channels: int, num_res_blocks: int = 2) -> T2IAdapter:
    """Return a T2I-Adapter for SDXL with random weights, float32; channels: of the UNet's control at each level."""
    return T2IAdapter(
        in_channels=condition_channels,
        channels=list(channels),
        num_res_blocks=num_res_blocks,
        downscale_factor=16,
        adapter_type="full_adapter_xl",
    )
