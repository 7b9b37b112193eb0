"""Tuned launch sizes: timed only when asked for, kept on disk, one file for each device and Triton version.

With LOCALCONTROL_AUTOTUNE=1 the sizes of every new shape are timed and the fastest is kept. Without it a shape that
is in the file runs at its tuned size, any other at the heuristic's: nothing is ever timed inside somebody's image.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import triton
import triton.testing

VARIABLE = "LOCALCONTROL_AUTOTUNE"
Sizes = dict[str, int]

MOST_PICKED = 4096  # shapes of a process: a picture has some ten

_tables: dict[Path, dict[str, Sizes]] = {}
_picked: dict[
    tuple, Sizes
] = {}  # (op, *shape, device) -> its sizes: found once, as a launch must not wait for it


def pick(
    op: str,
    shape: tuple,
    device: torch.device,
    default: Callable[[], Sizes],
    run: Callable[[Sizes], object],
) -> Sizes:
    """Return the sizes to launch `op` with on tensors like these: tuned ones where there are any, or `default`'s.

    shape: all that they depend on (dtype, layout, dimensions). run: launches once with the given sizes; it is called
    only to be timed, so it must not change its inputs.
    """
    key = (op, *shape, device)
    sizes = _picked.get(key)
    if sizes is None:
        sizes, final = _find(op, shape, device, default(), run)
        if final:
            if len(_picked) >= MOST_PICKED:
                _picked.clear()
            _picked[key] = sizes
    return sizes


def _find(
    op: str, shape: tuple, device: torch.device, default: Sizes, run: Callable[[Sizes], object]
) -> tuple[Sizes, bool]:
    """Return the sizes, and whether they are found for good: not where timing is asked for and must wait."""
    if device.type != "cuda":
        return default, True
    path = table_path(device)
    if path not in _tables:
        _tables[path] = _read(path)
    table, name = _tables[path], " ".join(map(str, (op, *shape)))
    known = table.get(name)
    if known is not None and known.keys() == default.keys():
        return known, True
    if os.environ.get(VARIABLE) != "1":
        return default, True
    if torch.cuda.is_current_stream_capturing():
        return default, False
    table[name] = min(candidates(default), key=lambda sizes: triton.testing.do_bench(lambda: run(sizes)))
    _write(path, table)
    return table[name], True


def candidates(default: Sizes) -> list[Sizes]:
    """Return the default first, then a half, two and four times its first block size with 2, 4 and 8 warps.

    Where a program walks a chunk of pixels, what it has in flight counts more: the default's block or twice that, 4 or
    8 warps, the whole chunk or half, and tiles loaded as they are needed or two before that.
    """
    block = next(name for name in default if name.startswith("BLOCK"))

    def scaled(name: str, *factors: float) -> list[int]:
        return [max(1, int(default[name] * factor)) for factor in factors]

    if "chunk" in default:
        varied = {block: scaled(block, 1, 2), "chunk": scaled("chunk", 1, 0.5)}
        varied |= {"num_warps": [4, 8], "STAGES": [1, 3]}
    else:
        varied = {block: scaled(block, 0.5, 1, 2, 4), "num_warps": [2, 4, 8]}
    found = [default]
    for values in product(*varied.values()):
        sizes = default | dict(zip(varied, values, strict=True))
        if sizes not in found:
            found.append(sizes)
    return found


def table_path(device: torch.device) -> Path:
    """Return where the tuned sizes of this device and this Triton are kept; without a home they are not kept."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a container's user that is a number alone
        cache = Path(os.devnull)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache / "localcontrol" / "autotune" / f"{name}-triton-{triton.__version__}.json"


def _read(path: Path) -> dict[str, Sizes]:
    """Return the table, or an empty one: a file that is missing or damaged costs only the tuning."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(table, dict):
        return {}
    return {name: sizes for name, sizes in table.items() if _is_sizes(sizes)}


def _is_sizes(sizes: object) -> bool:
    return isinstance(sizes, dict) and all(type(size) is int and size > 0 for size in sizes.values())


def _write(path: Path, table: dict[str, Sizes]) -> None:
    """Whole or not at all, with what another process has added meanwhile; a read-only disk only loses the tuning."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = _read(path) | table
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            json.dump(merged, file, indent=1, sort_keys=True)
        os.replace(part, path)
    except OSError:
        return
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
