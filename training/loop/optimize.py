"""The optimizer, its learning rate as a function of the step, and the averaged weights."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.errors import InputError
from training.config import TrainConfig


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW, fused; or bitsandbytes' in 8 bits. Its learning rate is set at every step."""
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    check_optimizer(config)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def check_optimizer(config: TrainConfig) -> None:
    """Raise InputError where the optimizer's package is missing."""
    if config.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("optimizer adamw8bit: needs the package bitsandbytes; pip install bitsandbytes")


def learning_rate(step: int, config: TrainConfig, samples: int) -> float:
    """Return a step's learning rate, the first being step 0; samples: of a step over all devices, by which `scale_lr`
    multiplies.
    """
    peak = config.lr * (samples if config.scale_lr else 1)
    return peak * schedule(step, config.steps, config.warmup, config.lr_schedule)


def schedule(step: int, steps: int, warmup: int, shape: str) -> float:
    """Return the share of the peak learning rate: it rises over `warmup` steps, then falls as `shape` says.

    shape: "cosine" or "linear", to 0 at the last of `steps`; any other is constant.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if shape == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if shape == "linear" else 1


class Average:
    """Exponential moving average of parameters. It follows them closely at first: (1 + n) / (10 + n) after n steps."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values: list[Tensor] = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """steps: taken so far."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)
