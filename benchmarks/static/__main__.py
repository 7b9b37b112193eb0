"""python -m benchmarks.static [--arch 80 90] [--op inject] [--quick] [--check] [--out benchmarks/results/static.csv]

Compiles every kernel for GPUs that need not be there, and writes what their machine code shows: registers, spills,
shared memory, the widths of global loads and stores, launches of a call, and the bytes it moves over the least. Rows
of a table that is there stay, but for those compiled anew.

One row for a kernel, variant, dtype, layout and architecture; `shapes` are those that one binary serves. tile_load and
tile_store are the bytes that one instruction moves of the tensors the op is about: 16 where neighbours in memory belong
to one thread. The loss is a stencil: a thread owns a pixel, so its taps are one element wide by design, and a warp's
taps are neighbours. `traffic` is of the whole call, counted in bfloat16; see benchmarks.static.traffic.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measure import RESULTS, check_out, write_rows
from benchmarks.static.compiling import Row, compile_all, kernels
from benchmarks.static.host_calls import runs_on, traffic_name
from runtime.cli.command import Parser, exit_code

ARCHS = (80, 86, 89, 90, 100, 120)
OPS = (
    "inject",
    "group_norm_silu",
    "geglu",
    "add_layer_norm",
    "float8_rows",
    "guidance_step",
    "sobel_z0_loss",
    "noise_and_z0_loss",
)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 where --check finds something; 2 for bad input; 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.static", description=__doc__.split("\n\n")[1])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument(
        "--op", nargs="+", choices=OPS, default=[], help="only these (default: all); rows of others stay"
    )
    parser.add_argument("--quick", action="store_true", help="bfloat16, NHWC, the first shape; no traffic")
    parser.add_argument(
        "--check", action="store_true", help="only tell where the table is not of these kernels"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "static.csv")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("with TRITON_INTERPRET=1 there is nothing to compile")
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Compile and write, or check; return 1 where that finds something."""
    if options.check:
        stale = out_of_date(options.out)
        print("\n".join(stale) or f"{options.out} is of these kernels")
        return min(len(stale), 1)
    check_out(options.out.parent)
    rows = compile_all(options.arch, options.quick, options.op)
    print("\n".join(summary(rows)), flush=True)
    if not options.quick:
        rows = others(options.out, options.arch, options.op) + rows
    write_traffic(options.out, rows, {})  # the longer half is to come
    if not options.quick:
        write_traffic(options.out, rows, measured_traffic(options.op))
    return 0


def others(path: Path, archs: Sequence[int], ops: Sequence[str]) -> list[Row]:
    """Return the table's rows that are not compiled anew: of other architectures, or other ops where some are named."""
    if not path.is_file():
        return []
    names = {f"sm_{arch}" for arch in archs}
    with path.open(newline="") as file:
        return [r for r in csv.DictReader(file) if r["arch"] not in names or (ops and r["op"] not in ops)]


def write_traffic(path: Path, rows: list[Row], traffic: dict[str, float]) -> None:
    """Write the table, one architecture after the other, with what is known of the bytes moved."""
    for row in rows:
        parts = [str(row[name]) for name in ("op", "variant", "way", "dtype", "layout", "shapes")]
        row["traffic"] = traffic.get(traffic_name(*parts), row.get("traffic", ""))
    write_rows(path, sorted(rows, key=lambda row: int(row["arch"].removeprefix("sm_"))))


def measured_traffic(ops: list[str]) -> dict[str, float]:
    """Call -> bytes moved over the least, of these ops or of all, from a process in which Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.static.traffic", *ops]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def out_of_date(path: Path) -> list[str]:
    """Return what the table lacks of today's kernels at today's block sizes, and what it has that is of others."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [{name: str(value) for name, value in row.items()} for row, _ in kernels()]
    found = []
    for arch in ARCHS:
        mine = [row for row in wanted if runs_on(arch, row["op"], row["variant"])]
        have = [{name: row[name] for name in wanted[0]} for row in rows if row["arch"] == f"sm_{arch}"]
        found += [f"missing: sm_{arch} {_line(row)}" for row in mine if row not in have]
        found += [f"not of these kernels: sm_{arch} {_line(row)}" for row in have if row not in mine]
    return found


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield a line for every kernel: the extremes over its variants, dtypes, layouts and architectures."""
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == kernel]
        registers = [row["registers"] for row in mine]
        spills, widths = sum(row["spills"] for row in mine), sorted({row["tile_load"] for row in mine})
        yield (
            f"{kernel:22} {len(mine):4} binaries, {min(registers):3} to {max(registers):3} registers, "
            f"{spills} spills, {' or '.join(map(str, widths))} bytes a load"
        )


def _call_name(row: Row) -> str:
    return " ".join(filter(None, (row["op"], row["variant"], row["way"])))


def _line(row: Row) -> str:
    return (
        f"{row['kernel']}, {_call_name(row)}, {row['dtype']} {row['layout']} {row['shapes']}, {row['blocks']}"
    )


if __name__ == "__main__":
    sys.exit(main())
