"""python -m runtime.batch REQUESTS OUT [--model MODEL ...]

Draw every request of a file; --help lists the options.
"""

from __future__ import annotations

# isort: off
import runtime.cli.interrupt  # noqa: F401 -- before the seconds that the other imports take
# isort: on

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli.cluster import add_ray, check_ray
from runtime.cli.command import Parser, exit_code, need, quick_imports
from runtime.cli.load import load
from runtime.cli.options import add_model, add_speed
from runtime.cli.plan import check_output
from runtime.errors import InputError
from runtime.machine.files import expand

if TYPE_CHECKING:
    from runtime.batch.requests import Line
    from runtime.batch.results import Results

EXAMPLES = """\
a line of REQUESTS, with paths from its folder:
  {"prompt": "a red star on sand", "seed": 7, "steps": 20,
   "regions": [{"condition": "star.png", "mask": "left.png", "adapter": "canny", "scale": 0.9}]}

examples:
  python -m runtime.batch requests.jsonl pictures
  python -m runtime.batch requests.parquet pictures --model sdxl.safetensors --adapter canny=t2i-adapter-canny-sdxl-1.0
  python -m runtime.batch requests.jsonl pictures --ray auto --replicas 8 --model sdxl.safetensors
"""
SAID = 10.0  # seconds between two lines of progress, where stderr is no terminal


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 where a request was refused or has failed; 2 for bad input; 130 after Ctrl-C."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: run(options), "interrupted: what is drawn stays; run it again for the rest")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m runtime.batch",
        usage="%(prog)s REQUESTS OUT [--model MODEL] [options]",
        description="Draw every request of a file. A picture is OUT/ab/<id>.png, where the id is a hash of its "
        "request, the model and the adapters; OUT/results (parquet) has a row for each picture: id, file, seed, "
        "seconds, error, source (of equal requests the first). "
        "Run again, it draws what is missing; a bad request is a row with its error.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "requests", type=Path, metavar="REQUESTS", help=".jsonl, .parquet, or a folder of regions.json"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder, made where there is none")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--rows",
        type=int,
        default=0,
        metavar="N",
        help="rows of the UNet in a step (default: by the machine)",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="no picture shares a step: the same bits every time"
    )
    group.add_argument(
        "--report", type=Path, metavar="FILE.json", help="counts, seconds, pictures a second, versions"
    )
    add_model(parser.add_argument_group("the model"))
    add_speed(parser.add_argument_group("speed and memory"))
    add_ray(parser.add_argument_group("several machines"))
    return parser


def run(options: argparse.Namespace) -> int:
    """Check, load, draw."""
    need("batch", "batch", ("anyio", "pyarrow", "pydantic"))
    from runtime.batch.requests import read

    if options.rows < 0:
        raise InputError(f"--rows {options.rows}: expected 0 or more")
    check_ray(options)
    if options.report:
        check_report(options)
    total, lines = read(options.requests)
    with quick_imports():
        from runtime.batch.results import opened
    counts, start, told = Counter(), time.monotonic(), Told(total)
    with (
        opened(options.out) as results,
        (on_ray if options.ray else here)(options, lines(), results) as drawn,
    ):
        for what in drawn:
            counts[what] += 1
            told.tell(counts)
    told.end(counts)
    if options.report:
        report(options, counts, time.monotonic() - start)
    return 1 if counts["refused"] or counts["failed"] else 0


def check_report(options: argparse.Namespace) -> None:
    """Raise InputError where the report cannot be written, or would replace the requests."""
    written = check_output(options.report, "--report", ".json")
    if written == expand(str(options.requests)).resolve():
        raise InputError(
            f"REQUESTS: {options.requests} would be overwritten by --report; expected another file"
        )


@contextmanager
def here(options: argparse.Namespace, lines: Iterator[Line], results: Results) -> Iterator[Iterator[str]]:
    """Draw in this process."""
    with quick_imports():
        from runtime.batch.draw import Drawer, draw
        from runtime.batch.orders import Ordered
        from runtime.serve.identity import model_hash
        from runtime.serve.orders import heard
    pipe = load(options)
    ordered = Ordered(pipe.capabilities, model_hash(options), deterministic=options.deterministic)
    with heard(), Drawer(pipe, options, options.rows) as drawer:
        yield draw(lines, drawer, ordered, results)


@contextmanager
def on_ray(options: argparse.Namespace, lines: Iterator[Line], results: Results) -> Iterator[Iterator[str]]:
    """Draw on a cluster."""
    from runtime.cli.cluster import connected

    with connected(options):
        with quick_imports():
            from runtime.batch.cluster import draw
        yield draw(lines, options, results)


class Told:
    """Says how far it is: a line that changes on a terminal, one now and then elsewhere."""

    def __init__(self, total: int):
        self.total, self.start, self.last = total, time.monotonic(), time.monotonic()
        self.every = 0.5 if sys.stderr.isatty() else SAID

    def tell(self, counts: Counter) -> None:
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            self._write(counts, "\r" if sys.stderr.isatty() else "\n")

    def end(self, counts: Counter) -> None:
        self._write(counts, "\n")

    def _write(self, counts: Counter, end: str) -> None:
        done, seconds = counts.total(), max(1e-6, time.monotonic() - self.start)
        rate, left = counts["drawn"] / seconds, (self.total - done) * seconds / max(1, done)
        others = "".join(
            f", {counts[what]} {what}" for what in ("there", "refused", "failed") if counts[what]
        )
        text = f"{done} of {max(done, self.total)}: {counts['drawn']} drawn{others}; {rate:.2f} pictures/s"
        text += f", {left / 60:.0f} min left" if left > 90 else f", {left:.0f} s left" if left >= 1 else ""
        print(f"{text:<100}" if end == "\r" else text, end=end, file=sys.stderr, flush=True)


def report(options: argparse.Namespace, counts: Counter, seconds: float) -> None:
    """Write what was drawn, how fast, and with what."""
    import torch

    import kernels
    from runtime.machine.files import write_json

    about = {
        "requests": str(options.requests),
        "counts": {what: counts[what] for what in ("drawn", "there", "refused", "failed")},
        "seconds": round(seconds, 3),
        "pictures_per_second": round(counts["drawn"] / seconds, 4),
        "model": options.model or options.engine or "embedded",
        "ray": options.ray,
        "versions": {"localcontrol": kernels.__version__, "torch": torch.__version__},
    }
    write_json(about, options.report)


if __name__ == "__main__":
    sys.exit(main())
