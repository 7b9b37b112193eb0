"""Attention of the UNet, by the implementation that was chosen for the block of code it runs in.

"auto" lets PyTorch choose for each shape, but for bfloat16 on a CPU without AMX: see `_in_products`. Its own
implementations can be asked for by name, those of the packages xformers and flash-attn where they are installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.errors import InputError

OWN = {  # PyTorch's
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = {
    "xformers": ("xformers.ops", "memory_efficient_attention"),
    "flash_attn": ("flash_attn", "flash_attn_func"),
}
ATTENTIONS = ("auto", *OWN, *PACKAGES)

SCORES = 2**19  # held at once by `_in_products`, in float32: 2 MiB, which stay in the cache
FEW_SCORES = 2**17  # below it one call of PyTorch's is quicker (AMD EPYC, torch 2.13)

_name = "auto"  # of what was chosen
# (query, key, value), each (B, S, heads, D), to (B, S, heads, D); None: PyTorch's
_function: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


@contextmanager
def use_attention(name: str) -> Iterator[None]:
    """Attend as `name` says, one of ATTENTIONS, in this block. InputError where it is unknown or not installed."""
    global _name, _function
    found, own = _find(name), OWN.get(name)
    previous, (_name, _function) = (_name, _function), (name, found)
    try:
        with nullcontext() if own is None else sdpa_kernel(own):
            yield
    finally:
        _name, _function = previous


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(D)) value: each (B, heads, S, D), the result as tokens (B, S, heads * D)."""
    # A compiler that looked inside would tie the graph to a batch, and to what was chosen.
    if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
        return _opaque(query, key, value)
    return _attend(query, key, value)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if _name == "auto" and _products_win(query, key):
        return _in_products(query, key, value).transpose(1, 2).flatten(2)
    if _function is None:
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return _function(*(x.transpose(1, 2) for x in (query, key, value))).flatten(2)


def _products_win(query: Tensor, key: Tensor) -> bool:
    """Whether PyTorch would have MKL multiply for its flash attention, which is slow in bfloat16 without AMX.

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
    """InputError unless attention `name` can run here, found by running it on one head of 64 channels."""
    with use_attention(name):
        if name == "auto":
            return
        x = torch.ones(1, 1, 16, 64, device=device, dtype=dtype)
        try:
            attend(x, x, x)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            kind = str(dtype).removeprefix("torch.")
            raise InputError(
                f"attention {name!r} cannot run on {device} in {kind}: {reason}; "
                f"expected another of {', '.join(ATTENTIONS)}"
            ) from error


def _find(name: str) -> Callable | None:
    if name in PACKAGES:
        module, function = PACKAGES[name]
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            package = module.partition(".")[0].replace("_", "-")
            raise InputError(
                f"attention {name!r} needs the package {package}; install it: pip install {package}"
            ) from error
    if name not in ATTENTIONS:
        raise InputError(f"attention {name!r}: unknown, expected {', '.join(ATTENTIONS)}")
    return None
