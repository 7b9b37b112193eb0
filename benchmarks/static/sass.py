"""Kernels compiled for a GPU that is not there, and what their machine code says.

A stand-in driver names the architecture, and a launch compiles and is noted instead of being launched: the host
functions that launch are the real ones, so strides, alignment and block sizes are those of a real launch.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import math
import re
import subprocess
import tempfile
import textwrap
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# a place in the source: file, line
Place = tuple[str, int]
TT_ACCESS = re.compile(r"tt\.(load|store) .* : tensor<([\dx]+)x!tt\.ptr<\w+>.* loc\((#loc\d*)\)")
TT_PLACE = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
SASS_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
LOADS, STORES, SPILLS = {"LDG", "LD", "LDGSTS"}, {"STG", "ST"}, {"LDL", "STL"}
BYTES = {
    "256": 32,
    "128": 16,
    "64": 8,
    "U16": 2,
    "S16": 2,
    "U8": 1,
    "S8": 1,
}  # of an instruction's suffix; else 4
OUTSIDE = {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    options: dict[str, object]  # block sizes and other compile-time constants
    compiled: object | None  # triton's CompiledKernel
    moved: int  # bytes of the tensors that it is given

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_")


@contextmanager
def noted_launches(arch: int | None = None) -> Iterator[list[Launch]]:
    """Yield the launches of this block, none of which runs: compiled for `arch` (90 for sm_90) where there is one."""
    found: list[Launch] = []
    run = JITFunction.run
    if arch is not None:
        triton.runtime.driver.set_active(_Driver(arch))

    def note(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options) if arch is not None else None
        moved = sum(footprint(t) for t in tree_leaves((args, options)) if isinstance(t, Tensor))
        found.append(Launch(self, options, compiled, moved))
        return compiled

    JITFunction.run = note
    try:
        yield found
    finally:
        JITFunction.run = run


def footprint(tensor: Tensor) -> int:
    """Return the bytes of memory that a tensor's elements are in; of an expanded one, each once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.itemsize


class _Driver:
    """What compiling asks of a driver. It stays active: there may be no other to go back to."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def figures(launch: Launch) -> dict[str, object]:
    """Registers, spills, shared memory and the widths of the global loads and stores of a compiled kernel.

    tile_load, tile_store: bytes of the narrowest instruction that reads or writes a whole tile of a tensor, 0 without
    one. loads, stores: all of them as "bytes x instructions", scalars and per-channel parameters included.
    """
    cubin, places = launch.compiled.asm["cubin"], tile_places(launch)
    usage = re.search(r"REG:(\d+)", _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin))
    loads, stores, widths_at, spills = Counter(), Counter(), {"load": [], "store": []}, 0
    for opcode, place in _instructions(_run(triton.knobs.nvidia.nvdisasm.path, "-c", "-g", cubin)):
        name, width = opcode.split(".")[0], width_of(opcode)
        spills += name in SPILLS
        for names, widths, kind in ((LOADS, loads, "load"), (STORES, stores, "store")):
            if name in names:
                widths[width] += 1
                widths_at[kind].append((place, width))
    tiles = {kind: of_tiles(found, places[kind]) for kind, found in widths_at.items()}
    for kind, found in tiles.items():
        if places[kind] and not found:
            raise ValueError(f"{launch.name}: the machine code does not say which {kind}s are a tile's")
    return {
        "registers": int(usage[1]),
        "spills": spills,
        "shared": launch.compiled.metadata.shared,
        "tile_load": min(tiles["load"], default=0),
        "tile_store": min(tiles["store"], default=0),
        "loads": _counts(loads),
        "stores": _counts(stores),
    }


def of_tiles(widths_at: list[tuple[Place, int]], places: set[Place]) -> list[int]:
    """Return the widths at these places.

    Where an instruction is on the line of that number, in another file, as the one before it, its file is not told
    (sm_90): then by the number alone.
    """
    lines = {line for _, line in places}
    exact = [width for place, width in widths_at if place in places]
    return exact or [width for (_, line), width in widths_at if line in lines]


def tile_places(launch: Launch) -> dict[str, set[Place]]:
    """Return where in the source the kernel loads and stores whole tiles, by the shapes in Triton's own
    representation.
    """
    text, options = launch.compiled.asm["ttgir"], launch.options
    elements = options["BLOCK"] if "BLOCK" in options else options["BLOCK_P"] * options["BLOCK_C"]
    defined = dict(TT_PLACE.findall(text))
    found: dict[str, set[Place]] = {"load": set(), "store": set()}
    for kind, shape, place in TT_ACCESS.findall(text):
        if math.prod(map(int, shape.split("x"))) == elements:
            found[kind].add(_resolve(place, defined))
    return found


def _resolve(place: str, defined: dict[str, str]) -> Place:
    """Follow names and call sites, the innermost first, to a file and line."""
    while True:
        known = re.search(r'"([^"]+)":(\d+):\d+', defined[place])
        if known:
            return known[1], int(known[2])
        place = re.search(r"#loc\d*", defined[place])[0]


def _instructions(sass: str) -> Iterator[tuple[str, Place]]:
    place = "", 0
    for line in sass.splitlines():
        if at := SASS_PLACE.search(line):
            place = at[1], int(at[2])
        elif instruction := SASS_INSTRUCTION.search(line):
            yield instruction[1], place


def width_of(opcode: str) -> int:
    """Return bytes a thread moves: 16 for LDG.E.128, 2 for STG.E.U16, 4 where nothing is said."""
    return next((BYTES[suffix] for suffix in opcode.split(".")[1:] if suffix in BYTES), 4)


def _counts(widths: Counter) -> str:
    return " ".join(f"{width}x{widths[width]}" for width in sorted(widths, reverse=True))


def _run(tool: str, *arguments: str | bytes) -> str:
    """Return the tool's output; its last argument is the content of the file it is to read."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(arguments[-1])
        file.flush()
        command = [tool, *arguments[:-1], file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def source_digest(kernel: JITFunction) -> str:
    """Return a hash of the kernel's code and of all it calls here: the same after a change of
    comments or line breaks.
    """
    parts = (f"{name}\n{text}" for name, text in sorted(_sources(kernel.fn).items()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _sources(function: Callable) -> dict[str, str]:
    """Name -> text of a function, of the kernels' functions it calls and of the constants it reads."""
    package = function.__module__.split(".")[0]
    found = {function.__qualname__: _code(inspect.getsource(function))}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, tl.constexpr):
            found[name] = repr(value.value)
        elif isinstance(value, JITFunction) and value.fn.__module__.split(".")[0] == package:
            found |= _sources(value.fn)
    return found


def _code(source: str) -> str:
    """Return the tokens, without comments and docstrings."""
    words, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline):
        starts = before in (tokenize.INDENT, tokenize.NEWLINE)
        docstring = starts and token.type == tokenize.STRING
        if token.type in OUTSIDE or docstring or (starts and token.type == tokenize.NEWLINE):
            continue
        before = token.type
        words.append(token.string.strip() or tokenize.tok_name[token.type])
    return " ".join(words)
