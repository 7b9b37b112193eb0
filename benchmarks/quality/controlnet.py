"""python -m benchmarks.quality.controlnet [--seeds 0] [--training-steps 400] [--count 70] [--work DIR] [--out DIR]

Compares a masked ControlNet with a masked T2I-Adapter on the embedded model: both trained on the same scenes, as many
steps of as many samples, then drawn with the same samples, seeds and masks, one after the other. Stop it at any moment
and run it again: trainings that are done stay. Writes controlnet.csv: a row a way and figure, and the differences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.measure import check_counts, check_out, environment, results_folder, write_rows
from benchmarks.quality import ablation
from benchmarks.quality.bootstrap import Estimate, interval, paired
from benchmarks.quality.evaluate import measure
from benchmarks.quality.samples import MASK_KINDS, Sample, held_out_samples
from runtime.cli.command import Parser, exit_code
from runtime.control.region import Region
from runtime.pipeline import LocalControlPipeline
from training.config import METHODS

TRAININGS = {"adapter": METHODS["masked-features"], "controlnet": METHODS["masked-controlnet"]}
WAYS = ("none", *TRAININGS)
FIGURES = ("lfmse_inside", "f1", "leakage", "seam", "step_seconds")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.quality.controlnet", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings (default 0)")
    parser.add_argument("--training-steps", type=int, default=400, help="steps of 32 (default 400)")
    parser.add_argument("--steps", type=int, default=30, help="of a picture (default 30)")
    parser.add_argument("--count", type=int, default=70, help="scenes, each with every mask (default 70)")
    parser.add_argument(
        "--work", type=Path, default=Path("out/ablation"), help="data, runs (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=results_folder() / "quality", help="default %(default)s")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options), "interrupted: run it again to go on")


def run(options: argparse.Namespace) -> None:
    """Train what is not trained yet, draw, measure, write."""
    check_counts(count=options.count, steps=options.steps, training_steps=options.training_steps)
    check_out(options.out)
    rows: list[dict] = []
    for seed in options.seeds:
        folders = {
            name: ablation.trained(
                ablation.configure(
                    f"controlnet-table-{name}", method, seed, options.training_steps, options.work
                )
            )
            for name, method in TRAININGS.items()
        }
        pipe = LocalControlPipeline.from_pretrained("embedded", folders)
        samples = held_out_samples(options.count, MASK_KINDS)
        bar = tqdm(samples, f"pictures, seed {seed}", options.count * len(MASK_KINDS), mininterval=5)
        rows += draw_all(pipe, bar, options.steps)
    stamp = {"training_steps": options.training_steps, "batch": ablation.SETTINGS["batch"], **environment()}
    lines = [{"way": way, "figure": name, **vars(e)} for way, name, e in compare(rows)]
    write_rows(options.out / "controlnet.csv", [line | stamp for line in lines])
    print(f"{len(rows) // len(WAYS)} pictures each way: {options.out / 'controlnet.csv'}")


def draw_all(pipe: LocalControlPipeline, samples: Iterable[Sample], steps: int) -> Iterator[dict]:
    """Yield a row of figures for every sample and way. step_seconds: of a denoising step, all that runs in it."""
    for sample in samples:
        height, width = sample.mask.shape[1:]
        options = {"steps": steps, "height": height, "width": width, "seed": sample.number}
        free = None
        for way in WAYS:
            region = Region(sample.condition, mask=sample.mask, adapter=way)
            result = pipe(sample.prompt, [] if way == "none" else [region], **options)
            image = np.asarray(result.images[0])
            free = image if free is None else free
            found = measure(image, free, sample) | {"step_seconds": result.timings["denoise"] / steps}
            yield {"number": sample.number, "way": way} | {name: found[name] for name in FIGURES}


def compare(rows: list[dict]) -> Iterator[tuple[str, str, Estimate]]:
    """Yield the mean of every figure of every way, and of the ControlNet's differences from the adapter."""
    by_way = {way: [row for row in rows if row["way"] == way] for way in WAYS}
    groups = np.array([row["number"] for row in by_way["none"]])
    for name in FIGURES:
        values = {way: np.array([row[name] for row in own], float) for way, own in by_way.items()}
        for way in WAYS:
            yield way, name, interval(values[way], groups)
        yield "controlnet - adapter", name, paired(values["controlnet"], values["adapter"], groups)


if __name__ == "__main__":
    sys.exit(main())
