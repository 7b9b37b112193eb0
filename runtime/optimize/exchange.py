"""Exchanging a layer for one that computes the same in another way."""

from __future__ import annotations

from torch import nn


def exchange(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Make `layer` a `kind`, in place: its parameters, their names and its place in the model stay.

    A hook, a reference or a state dict that knows the layer keeps knowing it, which a new module in its place would
    break. `kind` derives from the layer's class, or the layer's class from it (to change it back), and has no
    parameters of its own. Raises TypeError for another class.
    """
    if not (issubclass(kind, type(layer)) or issubclass(type(layer), kind)):
        raise TypeError(f"exchange: {kind.__name__} is not related to {type(layer).__name__}")
    layer.__class__ = kind
