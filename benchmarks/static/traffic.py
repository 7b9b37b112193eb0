"""TRITON_INTERPRET=1 python -m benchmarks.static.traffic [OP ...]

Bytes that the kernels of a call move over the least it can move, as JSON: the calls of benchmarks.static.host_calls
in bfloat16, run once by Triton's interpreter with their loads and stores counted.

Counted are the distinct bytes a program addresses, reads and writes apart, summed over programs: what a program reads
twice the second time comes from the cache beside it, what two programs read is counted twice, though the second may
find it in L2. The least is every input read once and every output written once; what launches leave to one another
(partial sums) is not part of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.static.host_calls import FEW_TILES, LAYOUTS, Call, calls, tensors_of, traffic_name


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("only Triton's interpreter can be counted: set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(len(LAYOUTS), mp_context=get_context("spawn")) as pool:
        tables = pool.map(of_layout, LAYOUTS, [sys.argv[1:]] * len(LAYOUTS))
        json.dump({k: v for found in tables for k, v in found.items()}, sys.stdout, indent=1)
    return 0


def of_layout(layout: str, ops: Sequence[str] = ()) -> dict[str, float]:
    """Return them, of these ops or of all, by the names that benchmarks.static looks for."""
    np.seterr(all="ignore")  # tensors of ones: the values do not matter
    found = {}
    for call in calls("cpu", torch.bfloat16, layout, FEW_TILES):
        if ops and call.op not in ops:
            continue
        name = traffic_name(call.op, call.variant, call.way, "bfloat16", layout, call.shape)
        found[name] = round(traffic(call), 3)
    return found


def traffic(call: Call) -> float:
    """Return bytes moved by the kernels of this call over the bytes of its inputs and outputs."""
    with counted_bytes() as programs:
        outputs = call.run()
    least = sum(t.numel() * t.itemsize for t in (*tensors_of(call.inputs.values()), *outputs))
    return sum(programs) / least


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Yield the bytes that each program of this block moves, one number a program."""
    done: list[int] = []
    accesses: defaultdict[tuple[str, int], list[np.ndarray]] = defaultdict(
        list
    )  # by kind and bytes of an element
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "set_grid_idx")
    kept = {name: getattr(InterpreterBuilder, name) for name in names}

    def note(kind: str, pointers, mask) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        data, active = np.broadcast_arrays(pointers.data, mask.data.astype(bool))  # some masks are integers
        accesses[kind, size].append(data[active])

    def finish() -> None:
        done.append(sum(size * len(np.unique(np.concatenate(a))) for (_, size), a in accesses.items()))
        accesses.clear()

    def load(self, pointers, mask, *rest):
        note("read", pointers, mask)
        return kept["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        note("write", pointers, mask)
        return kept["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, *rest):
        note("read", pointers, mask)
        note("write", pointers, mask)
        return kept["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def start_program(self, *index):
        finish()
        return kept["set_grid_idx"](self, *index)

    for name, hook in zip(names, (load, store, atomic, start_program), strict=True):
        setattr(InterpreterBuilder, name, hook)
    try:
        yield done
    finally:
        finish()
        for name, function in kept.items():
            setattr(InterpreterBuilder, name, function)


if __name__ == "__main__":
    sys.exit(main())
