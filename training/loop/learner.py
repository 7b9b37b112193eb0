"""What learns in a run: named parameters, their optimizer and average, and how many steps they took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from runtime.errors import InputError
from training.loop.optimize import Average

T = TypeVar("T")


class Learned(NamedTuple):
    """A learner's state, whole tensors on the CPU.

    weights, average: by parameter name; average is empty where the run has none. optimizer: "parameter/name" -> tensor.
    """

    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


class Learner:
    """Takes optimizer steps; `step` counts them.

    parameters: by name, in the optimizer's order. decay: of the average, 0 for none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, decay: float):
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.optimizer, self.step = optimizer, 0
        self.average = Average(self.parameters, decay) if decay else None

    def take_step(self, rate: float, backward: Callable[[], T], clip: Callable[[], bool]) -> T:
        """Take one step at a learning rate; return what `backward` returned.

        backward: adds up the parameters' gradients. clip: bounds them, and says whether they are to be used; a step
        whose gradients are not is counted all the same.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = backward()
        if clip():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average:
            self.average.update(self.step)
        return result

    @property
    def final(self) -> list[Tensor]:
        """Return the values that a finished run is about: averaged ones where there is an average."""
        return self.average.values if self.average else self.parameters

    def named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return whole copies on the CPU, by parameter name; all processes have to ask."""
        return dict(zip(self.names, map(whole, values), strict=True))

    def state(self) -> Learned:
        """Return everything that `restore` needs; all processes have to ask."""
        average = self.named(self.average.values) if self.average else {}
        return Learned(self.named(self.parameters), average, optimizer_tensors(self.optimizer, self.names))

    def check_fits(self, learned: Learned, where: object) -> None:
        """Raise InputError, naming `where` it lies, unless a state's weights are of the shapes that learn here."""
        shapes = {name: tuple(p.shape) for name, p in zip(self.names, self.parameters, strict=True)}
        theirs = {name: tuple(value.shape) for name, value in learned.weights.items()}
        for name in (*shapes, *theirs):
            if shapes.get(name) != theirs.get(name):
                raise InputError(
                    f"{where}: it trained another network: {name} {shapes.get(name)}, was {theirs.get(name)}; give "
                    "the control, adapter, channels and blocks that it had, or another --out"
                )

    @torch.no_grad()
    def restore(self, step: int, learned: Learned) -> None:
        """Put a state back. An average that the state does not have starts at its weights."""
        _put(self.names, self.parameters, learned.weights)
        if self.average:
            _put(self.names, self.average.values, learned.average or learned.weights)
        load_optimizer(self.optimizer, self.names, learned.optimizer)
        self.step = step


def _put(names: Sequence[str], tensors: Sequence[Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        tensor.copy_(sharded_as(values[name], tensor))


def optimizer_tensors(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Return an optimizer's state as "parameter/name" -> whole tensor on the CPU; names: of its parameters, in their
    order.
    """
    flat = {}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state[parameter].items():
            flat[f"{name}/{key}"] = whole(torch.as_tensor(value))
    return flat


def load_optimizer(optimizer: Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Put `optimizer_tensors` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(zip(names, _parameters(optimizer), strict=True)):
        mine = {
            key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name
        }
        state[i] = {k: sharded_as(v, parameter) if v.shape == parameter.shape else v for k, v in mine.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def whole(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU; of a sharded tensor all of it, for which all processes have to ask."""
    tensor = tensor.detach()
    copy = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
    return copy.cpu().contiguous()


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a copy on the device of `like`, laid out in memory as that is, and sharded as that is.

    The layout matters: fused optimizers walk through a parameter's memory and its state's side by side.
    """
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
