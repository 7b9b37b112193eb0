"""python -m benchmarks.quality [--model M] [--adapter NAME=PATH] [--data folder] [--count 48] [--curves] [--out folder]

Draws pictures with a control inside masks and measures two things: that it is followed inside, and that outside the
picture is as free as without control. Samples are held-out scenes of the embedded model's world, or --data, a folder of
pictures with a prompt beside each (name.txt). Writes to <out>: pictures.csv, a row a picture; summary.csv, means with
95 % intervals; report.md with sheet.png and leakage.png; with --curves also curves.csv and curves.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from benchmarks.measure import check_counts, check_out, environment, results_folder, write_rows
from benchmarks.quality import curves, distribution, plots, report
from benchmarks.quality.bootstrap import Estimate, interval
from benchmarks.quality.evaluate import LEAKAGE_BINS, Drawer, diversity, evaluate, measure, summary
from benchmarks.quality.samples import MASK_KINDS, Sample, folder_samples, held_out_samples
from runtime.cli.command import Parser, exit_code
from runtime.cli.sources import adapter_sources
from runtime.errors import InputError
from runtime.pipeline import LocalControlPipeline

SHEET_ROWS, CURVE_SAMPLES, DIVERSITY_SAMPLES, DIVERSITY_SEEDS = 8, 16, 8, range(6)
Shown = tuple[Sample, np.ndarray, np.ndarray]  # with its picture, and the one without control
TITLES = ("condition in the mask", "with control", "without", "difference x 4")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: run(options))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.quality", description=__doc__.partition("\n\n")[2])
    model = parser.add_argument_group("what draws")
    model.add_argument(
        "--model", default="embedded", help="what runtime.generate's --model takes (default embedded)"
    )
    model.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=PATH", help="as for runtime.generate"
    )
    model.add_argument("--engine", metavar="FOLDER", help="run the model on engines of export.build_engine")
    model.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as for runtime.generate")
    model.add_argument(
        "--control",
        choices=("features", "input", "everywhere"),
        default="features",
        help="what the mask gates",
    )
    model.add_argument("--mask-resize", choices=("area", "nearest"), default="area")
    model.add_argument("--steps", type=int, default=30)
    samples = parser.add_argument_group("what is drawn")
    samples.add_argument("--data", metavar="FOLDER", help="pictures and prompts; default: held-out scenes")
    samples.add_argument(
        "--conditions", metavar="FOLDER", help="ready conditions, named as the pictures in --data"
    )
    samples.add_argument("--masks-from", metavar="FOLDER", help="masks, named as the pictures in --data")
    samples.add_argument("--condition", default="canny", help="what the conditions are (default canny)")
    samples.add_argument("--masks", nargs="+", choices=MASK_KINDS, default=list(MASK_KINDS))
    samples.add_argument(
        "--size", type=int, help="pixels of a --data picture's side (default: the model's own)"
    )
    samples.add_argument("--count", type=int, default=48, help="scenes or pictures (default 48)")
    samples.add_argument("--without-prompt", action="store_true", help="draw from the condition alone")
    more = parser.add_argument_group("more measures")
    more.add_argument(
        "--curves", action="store_true", help="against strength, start and end; diversity over seeds"
    )
    more.add_argument("--fid-weights", metavar="FILE", help="FID with torch-fidelity's Inception weights")
    more.add_argument("--clip", metavar="FOLDER", help="CLIPScore with a CLIP model")
    parser.add_argument("--out", type=Path, default=results_folder() / "quality", help="default %(default)s")
    return parser


def run(options: argparse.Namespace) -> None:
    """Draw, measure, write."""
    check_counts(count=options.count)
    check_out(options.out)
    networks = load_networks(options)
    drawer = make_drawer(options)
    samples = make_samples(options, drawer.pipe)
    shown: list[Shown] = []
    vae = drawer.pipe.model.vae if isinstance(drawer.pipe.model.vae, AutoencoderKL) else None  # not an engine
    bar = tqdm(samples, desc="pictures", mininterval=5)
    rows = list(evaluate(drawer, bar, options.condition, vae, keep=lambda *drawn: shown.append(drawn)))
    found = summary(rows) | whole_set(shown, *networks)
    free = summary([{"number": s.number} | measure(free, free, s, options.condition) for s, _, free in shown])
    stamp = {"model": options.model, "control": options.control, "steps": options.steps, **environment()}
    if options.curves:
        of_one_kind = [s for s in samples if s.mask_kind == samples[0].mask_kind]
        found |= spread(drawer, of_one_kind)
        free |= spread(drawer.free_picture, of_one_kind)
        write_curves(options.out, curves.sweep(drawer, of_one_kind[:CURVE_SAMPLES], options.condition), stamp)
    write_rows(options.out / "pictures.csv", rows)
    write_summary(options.out, {"with control": found, "without": free}, stamp)
    write_sheet(options.out / "sheet.png", shown)
    report.write(options.out / "report.md", found, free, stamp, len(rows), options.curves)
    print(f"{len(rows)} pictures: {options.out / 'report.md'}")


def load_networks(options: argparse.Namespace) -> tuple[nn.Module | None, Path | None]:
    """Inception for FID, and CLIP's folder, where they are asked for; InputError before anything is drawn."""
    inception = distribution.inception(Path(options.fid_weights)) if options.fid_weights else None
    clip = Path(options.clip) if options.clip else None
    if clip:
        distribution.clip_score([], [], clip)  # loads it
    return inception, clip


def write_curves(out: Path, points: Iterable[dict], stamp: dict) -> None:
    """Against strength, start and end; see `curves.sweep`."""
    points = list(points)
    write_rows(out / "curves.csv", [point | stamp for point in points])
    plots.sweeps(points, out / "curves.png")


def write_summary(out: Path, figures: dict[str, dict[str, Estimate]], stamp: dict) -> None:
    """Means and intervals; figures: of which pictures -> figure -> estimate."""
    lines = [
        {"pictures": p, "figure": k, **vars(e)} for p, found in figures.items() for k, e in found.items()
    ]
    write_rows(out / "summary.csv", [line | stamp for line in lines])
    leakage = [figures["with control"][f"leakage_{near}px"] for near in LEAKAGE_BINS]
    plots.leakage_curves({"with control": leakage}, LEAKAGE_BINS, out / "leakage.png")


def write_sheet(path: Path, shown: list[Shown]) -> None:
    """Return some of the samples, spaced: not one scene with all its masks."""
    rows = min(SHEET_ROWS, len(shown))
    spaced = [shown[i * len(shown) // rows] for i in range(rows)]
    plots.sheet([(s.prompt or "(no prompt)", report.strip(s, *both)) for s, *both in spaced], TITLES, path)


def make_drawer(options: argparse.Namespace) -> Drawer:
    """Return the pipeline, and which adapter draws: the first one given, or the model's canny."""
    adapters = adapter_sources(options.adapter)
    if options.engine:
        pipe = LocalControlPipeline.from_engine(options.engine, adapters)
    else:
        pipe = LocalControlPipeline.from_pretrained(options.model, adapters, dtype=options.dtype)
    return Drawer(pipe, next(iter(adapters), "canny"), options.control, options.mask_resize, options.steps)


def make_samples(options: argparse.Namespace, pipe: LocalControlPipeline) -> list[Sample]:
    if options.data:
        found = folder_samples(
            options.data,
            options.size or pipe.default_size,
            options.count,
            options.masks,
            condition=options.condition,
            conditions=options.conditions,
            masks_from=options.masks_from,
        )
    elif options.conditions or options.masks_from or options.size:
        raise InputError(
            "conditions, masks-from and size belong to --data; expected a folder of pictures there"
        )
    else:
        found = held_out_samples(options.count, options.masks, options.condition)
    return [dataclasses.replace(s, prompt="") if options.without_prompt else s for s in found]


def whole_set(shown: list[Shown], inception: nn.Module | None, clip: Path | None) -> dict[str, Estimate]:
    """Return what takes all pictures at once: FID to the real pictures, CLIPScore."""
    found, images = {}, [image for _, image, _ in shown]
    if inception is not None:
        real = {s.number: s.picture for s, _, _ in shown if s.picture is not None}
        value = distribution.fid(list(real.values()), images, inception)
        found["fid"] = Estimate(value, float("nan"), float("nan"), len(images))  # one figure of the whole set
    if clip is not None:
        scores = distribution.clip_score(images, [s.prompt for s, _, _ in shown], clip)
        found["clip_score"] = interval(np.array(scores), groups=np.array([s.number for s, _, _ in shown]))
    return found


def spread(draw: Callable[[Sample, int], np.ndarray], samples: list[Sample]) -> dict[str, Estimate]:
    """Diversity over seeds, outside the mask and inside."""
    return summary(list(diversity(draw, samples[:DIVERSITY_SAMPLES], DIVERSITY_SEEDS)))


if __name__ == "__main__":
    sys.exit(main())
