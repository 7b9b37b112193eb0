"""What a compiler is told, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CompileOptions:
    """What a compiler may be told. Only TensorRT takes all of it.

    capabilities: GPUs to build for, such as "8.9". level: 0 to 5, how long to look for the fastest kernels. workspace:
    bytes of scratch memory. timing_cache: a file that keeps what was measured. refit: weights can be exchanged later.
    """

    target: str
    capabilities: tuple[str, ...] = ()
    level: int = 3
    workspace: int | None = None
    timing_cache: Path | None = None
    refit: bool = False


@dataclass(frozen=True)
class Compiled:
    """The engine's files, the one to open first, and how many layers compute in each precision."""

    files: tuple[Path, ...]
    layers: Mapping[str, int]


Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps
