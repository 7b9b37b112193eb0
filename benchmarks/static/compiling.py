"""Every kernel compiled for every architecture, side by side; in a module that other processes can import."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import triton

from benchmarks.static import sass
from benchmarks.static.host_calls import DTYPES, FIRST, LAYOUTS, REAL, calls, runs_on

Row = dict[str, object]


def compile_all(archs: list[int], quick: bool, ops: list[str]) -> list[Row]:
    """Return all rows, the architectures side by side on this machine's processors."""
    if len(archs) == 1:
        return compiled(archs[0], quick, ops)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        tables = pool.map(compiled, archs, [quick] * len(archs), [ops] * len(archs))
        return [row for table in tables for row in table]


def compiled(arch: int, quick: bool, ops: list[str]) -> list[Row]:
    """Return the rows of one architecture; ops: of these alone, of all where there are none."""
    rows = []
    for row, launch in kernels(arch, quick, ops):
        rows.append({"arch": f"sm_{arch}"} | row | sass.figures(launch) | {"triton": triton.__version__})
    return rows


def kernels(
    arch: int | None = None, quick: bool = False, ops: Sequence[str] = ()
) -> Iterator[tuple[Row, sass.Launch]]:
    """Yield what a row says of a kernel before it is compiled, and a launch; one binary for several
    shapes comes once.
    """
    found: dict[tuple, tuple[list[str], Row, sass.Launch]] = {}
    for dtype in list(DTYPES)[: 1 if quick else None]:
        for layout in list(LAYOUTS)[: 1 if quick else None]:
            for call in calls("meta", DTYPES[dtype], layout, FIRST if quick else REAL):
                if ops and call.op not in ops:
                    continue
                if arch is not None and not runs_on(arch, call.op, call.variant):
                    continue
                with sass.noted_launches(arch) as launches:
                    call.run()
                about = {"op": call.op, "way": call.way, "variant": call.variant, "launches": len(launches)}
                for launch in launches:
                    row = about | {"kernel": launch.name, "dtype": dtype, "layout": layout}
                    row |= {"blocks": blocks_of(launch), "source": sass.source_digest(launch.kernel)}
                    shapes, _, first = found.setdefault(tuple(row.values()), ([], row, launch))
                    shapes.append(call.shape)
                    if arch is not None and launch.compiled.hash != first.compiled.hash:
                        raise ValueError(f"{launch.name}: not the same binary at {' and '.join(shapes)}")
    for shapes, row, launch in found.values():
        yield row | {"shapes": " ".join(shapes)}, launch


def blocks_of(launch: sass.Launch) -> str:
    """Return the compile-time constants."""
    return " ".join(f"{name}={value}" for name, value in launch.options.items()).replace(", ", ",")
