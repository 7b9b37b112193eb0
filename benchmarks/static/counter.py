"""What a GPU would launch, move and allocate: operations of PyTorch and launches of our kernels, counted as they go by.

Tensors may be on the "meta" device, without values. Not in inference mode, which shows no operation's parts. Counted is
the least: an operation that is neither a view nor a bare allocation is a launch, a convolution with a bias two
(cuDNN's, and the sum after it: at::cudnn_convolution has no bias), and each launch reads and writes each of its tensors
once. Many of PyTorch's operations launch more kernels, or read twice; our own kernels are counted launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.static import sass

NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


@dataclass
class Count:
    """launches; moved: bytes read and written; allocations, allocated: new tensors, and their bytes."""

    launches: int = 0
    moved: int = 0
    allocations: int = 0
    allocated: int = 0


def count(run: Callable[[], object]) -> Count:
    """Return what `run` launches, moves and allocates; our kernels do not run."""
    with ExitStack() as stack:
        launches = stack.enter_context(sass.noted_launches())
        stack.enter_context(_Attention())
        found = stack.enter_context(_Counter()).found
        run()
    found.launches += len(launches)
    found.moved += sum(launch.moved for launch in launches)
    return found


def count_again(run: Callable[[], object]) -> Count:
    """Count the second call: what the first one makes for later ones, tickets and modules, is there."""
    count(run)
    return count(run)


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Count()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation.namespace == "localcontrol":  # what it allocates and launches, and not what it returns
            with self:
                return OPDEFS[operation._schema.name]._init_fn(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        result = _laid_out(operation, args, operation(*args, **kwargs))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            if tensor.untyped_storage()._cdata not in known:
                self.found.allocations += 1
                self.found.allocated += tensor.untyped_storage().nbytes()
        if _launches(operation) and any(t.numel() for t in made):
            self.found.launches += 1
            self.found.moved += sum(map(sass.footprint, [*given, *made]))
            if operation._schema.name == "aten::convolution" and args[2] is not None:
                self.found.launches += 1
                self.found.moved += 2 * sass.footprint(result) + sass.footprint(args[2])
        return result


def _laid_out(operation: torch._ops.OpOverload, args: tuple, result: object) -> object:
    """Return a convolution's result, or its input's gradient, in NHWC where an argument is, as cuDNN's is; on the meta
    device it is NCHW always.
    """
    if operation._schema.name not in ("aten::convolution", "aten::convolution_backward"):
        return result
    format = torch.channels_last
    if not any(isinstance(t, Tensor) and t.ndim == 4 and t.is_contiguous(memory_format=format) for t in args):
        return result
    images = result if isinstance(result, tuple) else (result,)
    images = tuple(t if t is None or t.ndim != 4 else t.contiguous(memory_format=format) for t in images)
    return images if isinstance(result, tuple) else images[0]


def _launches(operation: torch._ops.OpOverload) -> bool:
    aliases = [r.alias_info for r in operation._schema.returns if r.alias_info is not None]
    is_view = any(not alias.is_write for alias in aliases)
    return not is_view and operation._schema.name.removeprefix("aten::") not in NO_LAUNCH


class _Attention(TorchFunctionMode):
    """Attention as a GPU has it, one launch: tensors that are on none would get PyTorch's composition."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return function(*args, **(kwargs or {}))
