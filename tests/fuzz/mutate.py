"""Making inputs: bytes, JSON and tensors that were right once."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save

NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    -(2**63),
    10**400,
    1e-320,
    1e308,
)
VALUES = (
    None, True, False, "", " ", "x" * 5000, "\0", "é\u2028", "\udc80", "../../etc/passwd", "/etc/passwd", "~nobody/x",
    "__import__('os').system('true')", "NaN", float("nan"), float("inf"), [], {}, [[]], [None], {"": None}, *NUMBERS,
)  # fmt: skip
BYTES = (b"\0", b"\xff", b"\x7f", b"\r\n", b"9" * 20, b"[" * 2000, b"\xef\xbb\xbf", b"\x80\x02")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def damaged(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Return bytes changed in one to four places: flipped, cut, repeated, overwritten, spliced with others'."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        span = rng.choice((1, 2, 4, 8, 64, 512))
        kind = rng.randrange(7)
        if kind == 0 and out:
            at %= len(out)
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + span] = rng.randbytes(span)
        elif kind == 2:
            del out[at : len(out) if rng.random() < 0.5 else at + span]
        elif kind == 3:
            out[at:at] = out[at : at + span] * rng.choice((1, 10))
        elif kind == 4:
            piece = rng.choice(BYTES)
            out[at : at + len(piece)] = piece
        elif kind == 5 and others:
            other = rng.choice(others)
            out[at:] = other[rng.randrange(len(other) + 1) :]
        else:  # a number of the header
            value = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000))
            out[at : at + 4] = struct.pack(rng.choice("<>") + "I", value)
    return bytes(out)


def changed(value: Any, rng: random.Random) -> Any:
    """Return JSON with one to three of its parts replaced, dropped, added or nested."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1:
            holder[key] = [holder[key]]
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "__class__", "_class_name", "\udc80"))] = copy.deepcopy(
                rng.choice(VALUES)
            )
        elif kind == 3:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else None
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return root[0]


def _places(value: Any):
    """Yield (holder, key) of every part of a list or dictionary."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """Return changed JSON as text, now and then damaged, nested too deep, or in another encoding."""
    kind = rng.randrange(20)
    if kind == 0:
        return b"[" * rng.choice((100, 100_000)) + b"]" * 10
    if kind == 1:
        return b'{"a":' * rng.choice((100, 100_000)) + b"1"
    text = json.dumps(changed(value, rng))
    if kind == 2:
        return text.encode("utf-16")
    data = text.encode("utf-8")
    return damaged(data, rng) if kind < 8 else data


def tensors_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str], rng: random.Random) -> bytes:
    """Return a safetensors file whose tensors, names or header were changed."""
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(tensors)) if tensors else "x"
        kind = rng.randrange(7)
        value = tensors.get(name, torch.zeros(1))
        if kind == 0:
            tensors.pop(name, None)
        elif kind == 1:
            tensors[rng.choice((name + "x", "x." + name, name.replace(".", "_"), name.upper(), "é"))] = (
                value.clone()
            )
        elif kind == 2:
            tensors[name] = torch.zeros([rng.choice((0, 1, 2, 3, 64)) for _ in range(rng.randrange(5))])
        elif kind == 3:
            tensors[name] = value.to(rng.choice(DTYPES))
        elif kind == 4 and value.is_floating_point() and value.numel():
            value = value.clone()
            value.view(-1)[rng.randrange(value.numel())] = rng.choice((float("nan"), float("inf"), 1e38))
            tensors[name] = value
        elif kind == 5:
            tensors[
                name.rpartition(".")[0]
                + rng.choice((".alpha", ".dora_scale", ".diff", ".hada_w1_a", ".lokr_w1"))
            ] = torch.randn(
                rng.choice(((), (1,), (2, 2))), generator=torch.Generator().manual_seed(rng.randrange(2**31))
            )
        else:
            tensors[name] = value.reshape(-1)
    data = save({k: v.contiguous().clone() for k, v in tensors.items()}, metadata)
    if rng.random() < 0.3:
        return _with_header(data, rng)
    return damaged(data, rng) if rng.random() < 0.2 else data


def _with_header(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json_bytes(json.JSONDecoder().raw_decode(data[8 : 8 + length].decode())[0], rng)
    said = rng.choice((len(header), len(header), len(header), 2**63, 0, len(data) * 2))
    return struct.pack("<Q", said) + header + data[8 + length :]
