"""Attention of the UNet, by the implementation that was chosen for the block of code it runs in.

"auto" lets PyTorch choose for each shape, but for bfloat16 on a CPU without AMX: see `_in_products`. Its own
implementations can be asked for by name, those of the packages xformers and flash-attn where they are installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import InputError, first_line

Function = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # of query, key, value, each (B, heads, S, D), to one of theirs


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    width = query.shape[-1]
    if width % 8:  # its kernels take whole vectors
        query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, scale=width**-0.5)[0][..., :width]


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    return cudnn(query, key, value, None, torch.is_grad_enabled())[0]


def _efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, None, torch.is_grad_enabled())[0]


def _math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value)[0]


# PyTorch's, called one by one: `torch.nn.attention.sdpa_kernel` switches the others off for the whole process.
OWN = {"flash": _flash, "cudnn": _cudnn, "efficient": _efficient, "math": _math}
PACKAGES = {
    "xformers": ("xformers.ops", "memory_efficient_attention"),
    "flash_attn": ("flash_attn", "flash_attn_func"),
}
ATTENTIONS = ("auto", *OWN, *PACKAGES)

SCORES = 2**19  # held at once by `_in_products`, in float32: 2 MiB, which stay in the cache
FEW_SCORES = 2**17  # below it one call of PyTorch's is quicker (AMD EPYC, torch 2.13)

_chosen: ContextVar[Function | None] = ContextVar("localcontrol_attention", default=None)  # None: "auto"


@contextmanager
def use_attention(name: str) -> Iterator[None]:
    """Attend as `name` says, one of ATTENTIONS, in this block, in this thread or task only.

    Raises InputError where it is unknown or not installed.
    """
    token = _chosen.set(_function(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(D)) value: each (B, heads, S, D), the result as tokens (B, S, heads * D)."""
    # A compiler that looked inside would tie the graph to a batch, and to what was chosen.
    if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
        return _opaque(query, key, value)
    return _attend(query, key, value)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    function = _choice()
    if function is None:
        function = _in_products if _products_win(query, key) else F.scaled_dot_product_attention
    return function(query, key, value).transpose(1, 2).flatten(2)


@torch.compiler.assume_constant_result  # dynamo cannot trace a ContextVar
def _choice() -> Function | None:
    return _chosen.get()


def _products_win(query: Tensor, key: Tensor) -> bool:
    """Return whether PyTorch would have MKL multiply for its flash attention, which is slow in bfloat16 without AMX.

    MKL is there on x86 only. A graph that is traced for an engine keeps its attention whole.
    """
    return (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and query.shape[:-1].numel() * key.shape[2] >= FEW_SCORES
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def _in_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as products of some heads, or of some queries of one, at a time; each (B, heads, S, D), bfloat16.

    The scores are float32, as in flash attention; their product with the values is of bfloat16.
    """
    shape = query.shape
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    query, key = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (query, key))
    query = query * shape[-1] ** -0.5
    (rows, queries, _), keys = query.shape, key.shape[1]
    heads, part = max(1, SCORES // (queries * keys)), max(1, min(queries, SCORES // keys))
    out = torch.empty_like(query, dtype=value.dtype)
    for i in range(0, rows, heads):
        for j in range(0, queries, part):
            weights = _scores(query[i : i + heads, j : j + part], key[i : i + heads]).softmax(-1)
            torch.bmm(weights.to(value.dtype), value[i : i + heads], out=out[i : i + heads, j : j + part])
    return out.view(shape)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """query key^T in float32, (heads, S, S'); of one head by oneDNN, which can be twice as quick as a batch by MKL."""
    if len(query) > 1:
        return torch.bmm(query, key.mT)
    return torch.ops.mkldnn._linear_pointwise(query, key[0], None, "none", [], "")


_opaque = torch.library.custom_op("localcontrol::attend", _attend, mutates_args=())


@_opaque.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads * width)


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError unless attention `name` can run here, found by running it on one head of 64 channels."""
    with use_attention(name):
        if name == "auto":
            return
        x = torch.ones(1, 1, 16, 64, device=device, dtype=dtype)
        try:
            attend(x, x, x)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = first_line(error).partition(". ")[0]  # PyTorch goes on with a page about itself
            kind = str(dtype).removeprefix("torch.")
            raise InputError(
                f"attention {name!r} cannot run on {device} in {kind}: {reason}; "
                f"expected another of {', '.join(ATTENTIONS)}"
            ) from error


def _function(name: str) -> Function | None:
    """Return what computes attention `name`, None where PyTorch chooses. Raises InputError: see `use_attention`."""
    if name not in ATTENTIONS:
        raise InputError(f"attention {name!r}: unknown, expected {', '.join(ATTENTIONS)}")
    if name not in PACKAGES:
        return OWN.get(name)
    module, attribute = PACKAGES[name]
    try:
        theirs = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0].replace("_", "-")
        raise InputError(
            f"attention {name!r} needs the package {package}; install it: pip install {package}"
        ) from error

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Transpose to and from the package's layout, (B, S, heads, D)."""
        return theirs(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    return function
