"""python -m benchmarks.quality.outside [--model M] [--adapter NAME=PATH] [--count 70] [--out folder]

Compares three ways to keep a control local, each with the same samples, seeds and masks: the outside free, the outside
held, and the naive way, the controlled picture's inside pasted into the uncontrolled picture. Writes outside.csv: a row
a way and figure, and the differences, picture by picture, of held to the two others.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.measure import check_counts, check_out, environment, results_folder, write_rows
from benchmarks.quality.bootstrap import Estimate, interval, paired
from benchmarks.quality.evaluate import measure
from benchmarks.quality.samples import MASK_KINDS, Sample, held_out_samples
from runtime.cli.command import Parser, exit_code
from runtime.cli.sources import adapter_sources
from runtime.control.region import Region
from runtime.pipeline import LocalControlPipeline
from runtime.sampling.result import Result

WAYS = ("free", "held", "pasted")
FIGURES = ("lfmse_inside", "f1", "seam", "leakage", "seconds", "seconds_with_reference")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: run(options))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.quality.outside", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--model", default="embedded", help="what runtime.generate's --model takes")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="likewise")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--count", type=int, default=70, help="scenes, each with every mask (default 70)")
    parser.add_argument("--out", type=Path, default=results_folder() / "quality", help="default %(default)s")
    return parser


def run(options: argparse.Namespace) -> None:
    """Draw, measure, write."""
    check_counts(count=options.count, steps=options.steps)
    check_out(options.out)
    adapters = adapter_sources(options.adapter)
    pipe = LocalControlPipeline.from_pretrained(options.model, adapters)
    samples = list(held_out_samples(options.count, MASK_KINDS))
    bar = tqdm(samples, desc="pictures", mininterval=5)
    rows = list(draw_all(pipe, bar, next(iter(adapters), "canny"), options.steps))
    stamp = {"model": options.model, "steps": options.steps, **environment()}
    lines = [{"way": way, "figure": name, **vars(e)} for way, name, e in compare(rows)]
    write_rows(options.out / "outside.csv", [line | stamp for line in lines])
    print(f"{len(samples)} pictures each way: {options.out / 'outside.csv'}")


def draw_all(
    pipe: LocalControlPipeline, samples: Iterable[Sample], adapter: str, steps: int
) -> Iterator[dict]:
    """Yield a row of figures for every sample and way.

    seconds: of one more region, the uncontrolled picture being there; seconds_with_reference: of both.
    """
    for sample in samples:
        height, width = sample.mask.shape[1:]
        options = {"steps": steps, "height": height, "width": width, "seed": sample.number}
        regions = [Region(sample.condition, mask=sample.mask, adapter=adapter)]
        reference, first = _timed(pipe, sample.prompt, outside="held", **options)
        free, of_free = _timed(pipe, sample.prompt, regions, **options)
        options |= {"outside": "held", "reference": reference.reference}
        held, of_held = _timed(pipe, sample.prompt, regions, **options)
        uncontrolled, controlled, kept = (np.asarray(x.images[0]) for x in (reference, free, held))
        pasted = np.where(sample.mask[0].numpy()[..., None] > 0, controlled, uncontrolled)
        ways = (
            (controlled, of_free, of_free),
            (kept, of_held, first + of_held),
            (pasted, of_free, first + of_free),
        )
        for way, (image, alone, both) in zip(WAYS, ways, strict=True):
            found = measure(image, uncontrolled, sample) | {"seconds": alone, "seconds_with_reference": both}
            yield {"number": sample.number, "way": way} | {name: found[name] for name in FIGURES}


def compare(rows: list[dict]) -> Iterator[tuple[str, str, Estimate]]:
    """Yield the mean of every figure of every way, and of the differences between them."""
    by_way = {way: [row for row in rows if row["way"] == way] for way in WAYS}
    groups = np.array([row["number"] for row in by_way["held"]])
    for name in FIGURES:
        values = {way: np.array([row[name] for row in own], float) for way, own in by_way.items()}
        for way in WAYS:
            yield way, name, interval(values[way], groups)
        for other in ("free", "pasted"):
            yield f"held - {other}", name, paired(values["held"], values[other], groups)


def _timed(pipe: LocalControlPipeline, *arguments, **options) -> tuple[Result, float]:
    start = time.perf_counter()
    result = pipe(*arguments, **options)
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
