"""What an adapter must be, whether PyTorch or an engine runs it: a condition in, four feature maps out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.control.masks import LUMINANCE
from runtime.errors import InputError

TYPE = "full_adapter_xl"


class Adapter(Protocol):
    """diffusers' T2IAdapter, or an engine in its place.

    config has in_channels (1 or 3), channels (of the feature maps) and adapter_type. A call turns a condition
    (1, in_channels, H, W) in [0, 1] into the feature maps (1, C_l, h_l, w_l), see `levels.level_sizes`.
    """

    config: Any

    def __call__(self, condition: Tensor) -> Sequence[Tensor]: ...


def check_name(name: str, known: Collection[str], what: str = "adapter") -> None:
    """Raise InputError unless the adapter that a region asks for is among the `known` ones."""
    if name not in known:
        listed = ", ".join(sorted(known)) or "none is loaded"
        raise InputError(f"{what} {name!r} is unknown; expected one of: {listed}")


def check_adapter(name: str, adapters: Mapping[str, Adapter], channels: Sequence[int]) -> None:
    """Raise InputError unless the adapter of that name is known and gives the UNet's `channels` at each level."""
    check_name(name, adapters.keys())
    config = adapters[name].config
    if config.adapter_type != TYPE:
        raise InputError(f"adapter {name!r}: its type is {config.adapter_type}, expected {TYPE}")
    if tuple(config.channels) != tuple(channels):
        raise InputError(
            f"adapter {name!r} has features of {tuple(config.channels)} channels, the UNet expects {tuple(channels)}"
        )
    if config.in_channels not in (1, 3):
        raise InputError(f"adapter {name!r} reads {config.in_channels} channels, expected 1 or 3")


def fit_channels(condition: Tensor, channels: int) -> Tensor:
    """Return (B, 1 | 3, H, W) as (B, channels, H, W), channels 1 or 3: grey repeated, or colour reduced to its
    luminance.
    """
    if condition.shape[1] == channels:
        return condition
    if channels == 3:
        return condition.expand(-1, 3, -1, -1)
    return (condition * condition.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)


def same_condition(left: Tensor, right: Tensor) -> bool:
    """Return whether two conditions are the same picture."""
    return left is right or (left.shape == right.shape and torch.equal(left, right))
