"""What a LoRA, or one of its relatives, makes of a layer's weight.

lora    alpha / r * up @ down                                                             arXiv 2106.09685
locon   the same of convolutions; with mid: up x mid x down (a Tucker decomposition)     arXiv 2309.14859
loha    alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)                                          arXiv 2108.06098
lokr    alpha / r * kron(w1, w2), each whole or a product                                  arXiv 2309.14859
diff    the difference itself
dora    scale * V / |V| with V = W + the above; |V| along the axes where scale has length 1  arXiv 2402.09353
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Matrices = Mapping[str, Tensor]  # of one layer, by the kinds of `lora_names`, float32


def new_weight(weight: Tensor, matrices: Matrices, scale: float | None, strength: float) -> Tensor:
    """Return the weight with a layer's matrices in it, float32, of its shape.

    scale: what alpha / r is where the file has no alpha; None for 1. strength: the user's, 0 for nothing. Raises
    ValueError or RuntimeError where the matrices do not belong together or do not fit the weight.
    """
    old = weight.float()
    change = delta(matrices, scale, old.shape)
    change = torch.zeros_like(old) if change is None else change
    if "magnitude" in matrices:  # PEFT's: one for each output, and the strength within V
        return _rescaled(old + strength * change, matrices["magnitude"].reshape(-1, *[1] * (old.ndim - 1)))
    if "dora_scale" in matrices:
        return old + strength * (_rescaled(old + change, matrices["dora_scale"]) - old)
    return old + strength * change


def _rescaled(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return magnitude * V / |V|: the norm is along the axes where magnitude, of as many axes, has length 1."""
    kept = [axis for axis in range(magnitude.ndim) if magnitude.shape[axis] != 1]
    fits = magnitude.ndim == weight.ndim and all(magnitude.shape[axis] == weight.shape[axis] for axis in kept)
    if not fits or len(kept) > 1:
        raise ValueError(f"dora_scale of shape {tuple(magnitude.shape)}, the weight is {tuple(weight.shape)}")
    axes = [axis for axis in range(weight.ndim) if axis not in (kept or [0])]
    norm = weight.square().sum(dim=axes, keepdim=True).sqrt()
    return magnitude * weight / norm.clamp_min(torch.finfo(torch.float32).eps)


def delta(matrices: Matrices, scale: float | None, shape: torch.Size) -> Tensor | None:
    """Return what is added to a weight of `shape`, float32; None where nothing is. See `new_weight`."""
    kinds = matrices.keys() - {"alpha", "dora_scale", "magnitude", "diff_b", "up_bias"}
    if matrices.keys() == {"alpha"}:
        raise ValueError("it has an alpha and no matrices")
    if not kinds:
        return None
    if kinds == {"diff"}:
        return _fit(matrices["diff"], shape)
    product, rank = _product(kinds, matrices)
    if rank == 0:
        raise ValueError("its rank is 0")
    if rank is not None and "alpha" in matrices:
        scale = matrices["alpha"].item() / rank
    return (1.0 if scale is None or rank is None else scale) * _fit(product, shape)


def _fit(change: Tensor, shape: torch.Size) -> Tensor:
    """Return a change in a weight's shape; it may be flat, or lack axes of length 1, but have no other order."""
    same = [n for n in change.shape if n != 1] == [n for n in shape if n != 1]
    flat = change.ndim == 2 and change.numel() == shape.numel() and len(change) == shape[0]
    if not (same or flat):
        raise ValueError(f"it is of shape {tuple(change.shape)}, the weight is {tuple(shape)}")
    return change.reshape(shape)


def _product(kinds: set[str], m: Matrices) -> tuple[Tensor, int | None]:
    """Return the matrices' product and their rank, None where none of them is decomposed."""
    if kinds == {"up", "down"}:
        return _times(m["up"], m["down"]), len(m["down"])
    if kinds == {"up", "down", "mid"}:
        up, down = m["up"].flatten(1), m["down"].flatten(1)
        return torch.einsum("oa,ab...,bi->oi...", up, m["mid"], down), len(m["down"])
    if all(kind.startswith("hada_") for kind in kinds):
        return _hadamard(kinds, m)
    if all(kind.startswith("lokr_") for kind in kinds):
        return _kronecker(kinds, m)
    raise ValueError(f"its {', '.join(sorted(kinds))} do not belong together")


def _times(up: Tensor, down: Tensor) -> Tensor:
    """Return up @ down, of convolutions of (out, in, k, k): one of the two is 1 x 1."""
    if up.ndim == 4 and up.shape[2:].numel() > 1:
        return torch.einsum("ob...,bi->oi...", up, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _hadamard(kinds: set[str], m: Matrices) -> tuple[Tensor, int]:
    plain = {f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"}
    if kinds == plain:
        return (m["hada_w1_a"] @ m["hada_w1_b"]) * (m["hada_w2_a"] @ m["hada_w2_b"]), len(m["hada_w1_b"])
    if kinds == plain | {"hada_t1", "hada_t2"}:
        halves = [_tucker(m[f"hada_t{i}"], m[f"hada_w{i}_a"], m[f"hada_w{i}_b"]) for i in (1, 2)]
        return halves[0] * halves[1], len(m["hada_w1_b"])
    raise ValueError(f"a LoHa with {', '.join(sorted(kinds))}, expected {', '.join(sorted(plain))}")


def _kronecker(kinds: set[str], m: Matrices) -> tuple[Tensor, int | None]:
    first, second = (_factor(i, kinds, m) for i in (1, 2))
    rank = None
    for name in ("lokr_w2_b", "lokr_w1_b"):  # LyCORIS' order: the first that there is
        rank = len(m[name]) if name in kinds else rank
    # torch.kron refuses some tensors of einsum's strides
    product = torch.einsum("ab,cd...->acbd...", first, second)
    return product.flatten(2, 3).flatten(0, 1), rank


def _factor(i: int, kinds: set[str], m: Matrices) -> Tensor:
    whole, a, b = f"lokr_w{i}", f"lokr_w{i}_a", f"lokr_w{i}_b"
    own = {kind for kind in kinds if kind.startswith(whole) or kind == f"lokr_t{i}"}
    if own == {whole}:
        return m[whole]
    if own == {a, b}:
        return (m[a] @ m[b].flatten(1)).reshape(len(m[a]), *m[b].shape[1:])
    if own == {a, b, f"lokr_t{i}"}:
        return _tucker(m[f"lokr_t{i}"], m[a], m[b])
    raise ValueError(f"a LoKr with {', '.join(sorted(own)) or f'no w{i}'}, expected {whole}, or {a} and {b}")


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return (p, r, k, k) of core (i, j, k, k), left (i, p), right (j, r), as LyCORIS builds it."""
    return torch.einsum("ij...,ip,jr->pr...", core, left, right)
