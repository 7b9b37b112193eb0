"""python -m benchmarks.gpu [--out FOLDER] [--budget 540] [--stages tests,kernels,step] [--small]

What a GPU says of this program, the most valuable first: the kernels' tests, the kernels' times, a denoising step, a
picture, the VAE, training, diffusers on the same weights, float8, batches, offloading, tuned kernels. SDXL of full
size with random weights. Rows are written as they are measured; a run that is cut off keeps them, and the next one of
the same commit, device and versions goes on from there. Prints a table of all rows last, and draws them. --small
rehearses it on a CPU with a small model; it measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.stages import ORDER, run_all, run_group
from benchmarks.gpu.summary import print_summary
from benchmarks.measure import check_out, results_folder
from runtime.cli.command import Parser, exit_code
from runtime.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 where a stage failed; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the CSV files")
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds, of all stages together (default 540)"
    )
    parser.add_argument("--stages", default=",".join(ORDER), help=f"of {','.join(ORDER)} (default: all)")
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU too: tries every stage")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    options.stages = options.stages.split(",")
    unknown = [stage for stage in options.stages if stage not in ORDER]
    if unknown:
        raise InputError(f"stages {','.join(unknown)}: unknown; expected {','.join(ORDER)}")
    check_out(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    from benchmarks import kernels
    from benchmarks.gpu import ours

    for tables in (kernels, ours):
        tables.table_of(options.out)  # one of another version is refused before anything is measured
    if options.here:
        run_group(options.stages, options.out, options.budget, options.small)
        return 0
    failed = run_all(options)
    print_summary(options.out)
    if find_spec("matplotlib") is not None:  # not every GPU image has it
        from benchmarks.gpu.plots import draw

        draw(options.out)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
