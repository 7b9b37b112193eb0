"""python -m benchmarks.quality.ablation [--seeds 0 1 2] [--training-steps 400] [--engine folder] [--out folder]

Trains an adapter of the embedded model with every variant of the method and measures them on the same held-out scenes,
masks and seeds. All start from the same random weights and see the same samples, prompts, noise and timesteps in the
same order, at the same batch, learning rate and schedule: only the variant differs. Stop it at any moment and run it
again: what is done stays. Writes to <out>: ablation.csv, differences.csv, tradeoff.csv, their plots, ablation.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import check_counts, check_out, environment, results_folder, write_rows
from benchmarks.quality import plots
from benchmarks.quality.ablation_report import write_report
from benchmarks.quality.bootstrap import Estimate, paired
from benchmarks.quality.evaluate import LEAKAGE_BINS, Drawer, evaluate, summary
from benchmarks.quality.samples import Sample, held_out_samples
from runtime.cli.command import Parser, exit_code
from runtime.machine.files import write_json
from runtime.pipeline import LocalControlPipeline
from training import train_adapter
from training.config import METHODS, TrainConfig
from training.embedded.scenes import write_scenes
from training.loop.validate import NAME

SCENES = 4000
SETTINGS = {
    "batch": 32, "accumulate": 1, "adapter_blocks": 1, "dtype": "auto", "workers": 1, "validate_every": 0,
    "save_every": 200, "keep": 1, "lr": 1e-3, "lr_schedule": "cosine", "warmup": 50, "beta2": 0.99, "ema": 0.99,
}  # fmt: skip
LATE = {"z0_schedule": "step_range", "z0_from": 500}  # the noisier half, where the picture is laid out

# name -> what differs. The weights of the z0 terms: 0.1 is the paper's, which here is 1 % of the noise loss.
VARIANTS: Mapping[str, dict[str, Any]] = {
    "global": METHODS["global"],
    "masked input": METHODS["masked-input"],
    "masked features": METHODS["masked-features"],
    "masked features, nearest": METHODS["masked-features"] | {"mask_resize": "nearest"},
    "+ z0 MSE 0.1": METHODS["masked-z0"] | {"z0_weight": 0.1},
    "+ Sobel z0 0.1": METHODS["masked-sobel"] | {"z0_weight": 0.1},
    "+ Sobel z0 1": METHODS["masked-sobel"] | {"z0_weight": 1.0},
    "+ Sobel z0 10": METHODS["masked-sobel"] | {"z0_weight": 10.0},
    "+ Sobel z0 100": METHODS["masked-sobel"] | {"z0_weight": 100.0},
    "+ Sobel z0 10, late steps": METHODS["masked-sobel"] | {"z0_weight": 10.0} | LATE,
    "+ Sobel z0 10, time": METHODS["masked-sobel"] | {"z0_weight": 10.0, "z0_schedule": "time"},
    "+ Laplacian z0 10": METHODS["masked-laplacian"] | {"z0_weight": 10.0},
}

BASE = "masked features"  # what the others are compared with
TRADED, SCALES = ("masked input", BASE), (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
DRAWN = ("global", "masked input", BASE, "+ Sobel z0 100", "+ Laplacian z0 10")  # curves of leakage
TRADED_FIGURES, ENDS = ("lfmse_inside", "leakage"), ("mean", "low", "high")
COMPARED = ("lfmse_inside", "lfmse_outside_wanted", "f1", "ssim", "leakage", "injected_outside", "seam")


def configuration(variant: str, seed: int, steps: int, work: Path) -> TrainConfig:
    """Return how a variant is trained, in a folder of `work`."""
    return configure(variant, VARIANTS[variant], seed, steps, work)


def configure(variant: str, method: Mapping[str, Any], seed: int, steps: int, work: Path) -> TrainConfig:
    """Return how a method is trained that is called `variant`."""
    name = "".join(c if c.isalnum() or c == "." else "-" for c in variant).strip("-")
    paths = {"data": str(work / "scenes"), "cache": str(work / "cache")}
    run = {"out": str(work / f"{name}-{steps}-{seed}"), "steps": steps, "seed": seed}
    return TrainConfig(**{**SETTINGS, **method, **paths, **run})


def trained(config: TrainConfig) -> Path:
    """Return the folder of the adapter: trained, or gone on with, or as it is where it is done."""
    if not (Path(config.data) / f"{SCENES - 1:06d}.txt").exists():
        write_scenes(Path(config.data), SCENES)
    if not (Path(config.out) / "training.json").exists():
        train_adapter.train(config)
    return Path(config.out)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.quality.ablation", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings (default 0 1 2)"
    )
    parser.add_argument("--training-steps", type=int, default=400, help="steps of 32 (default 400)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--count", type=int, default=32, help="held-out scenes (default 32)")
    parser.add_argument(
        "--engine", metavar="FOLDER", help="draw with the embedded model compiled by export.build_engine"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/ablation"), help="data, runs (default out/ablation)"
    )
    parser.add_argument("--out", type=Path, default=results_folder() / "ablation", help="default %(default)s")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options), "interrupted: run it again to go on")


def run(options: argparse.Namespace) -> None:
    """Train and measure what is not done yet, then write the tables."""
    check_out(options.out)
    check_counts(count=options.count)
    samples, free = make_samples(options.count), {}
    rows = {"no control": measured(options, None, samples, free)}
    for variant in options.variants:
        rows[variant] = []
        for seed in options.seeds:
            config = configuration(variant, seed, options.training_steps, options.work)
            trained(config)
            rows[variant] += [{"seed": seed, **row} for row in measured(options, config, samples, free)]
            print(f"{variant}, seed {seed}: measured", flush=True)
    stamp = {"training_steps": options.training_steps, "batch": SETTINGS["batch"], **environment()}
    overall = {variant: without_seed(found) for variant, found in rows.items()}
    by_mask = table(rows)
    write_rows(options.out / "ablation.csv", [row | stamp for row in by_mask])
    against = differences(rows)
    write_rows(options.out / "differences.csv", [row | stamp for row in against])
    plots.dots(overall, options.out / "ablation.png")
    curves = {
        name: [overall[name][f"leakage_{near}px"] for near in LEAKAGE_BINS]
        for name in DRAWN
        if name in overall
    }
    plots.leakage_curves(curves, LEAKAGE_BINS, options.out / "leakage.png")
    points = tradeoff(options, samples, free)
    write_rows(options.out / "tradeoff.csv", [point | stamp for point in points])
    plots.tradeoff(points, options.out / "tradeoff.png")
    write_report(options.out / "ablation.md", overall, by_mask, against, len(rows[variant]), BASE, stamp)


def make_samples(count: int) -> list[Sample]:
    """Return every scene with its three masks, and once more with the random one and without a prompt."""
    prompted = list(held_out_samples(count))
    silent = [dataclasses.replace(s, prompt="") for s in prompted if s.mask_kind == "random"]
    return prompted + silent


def measured(options, config: TrainConfig | None, samples: Sequence[Sample], free: dict) -> list[dict]:
    """Return a row a picture of one adapter, or of no control; kept beside the adapter, so that it draws them once."""
    folder = options.work / "none" if config is None else Path(config.out)
    kept = folder / f"measures-{options.count}.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(evaluate(make_drawer(options, config, free), samples))
        write_json({"rows": rows}, kept)
    return json.loads(kept.read_text("utf-8"))["rows"]


def make_drawer(options, config: TrainConfig | None, free: dict) -> Drawer:
    """Return the figures of a trained adapter, used as its method uses it; None: without control."""
    adapters = None if config is None else {NAME: config.out}
    if options.engine:
        pipe = LocalControlPipeline.from_engine(options.engine, adapters)
    else:
        pipe = LocalControlPipeline.from_pretrained("embedded", adapters)
    control, resize = ("none", "area") if config is None else (config.control, config.mask_resize)
    return Drawer(pipe, NAME, control, resize, free=free)


def tradeoff(options, samples: Sequence[Sample], free: dict) -> list[dict]:
    """Return how much leaks at each strength, and how closely that strength follows, of TRADED with each training seed.

    At one strength a method that follows less also leaks less; this tells which leaks less where both follow alike.
    """
    kept = options.work / f"tradeoff-{options.count}.json"
    if not kept.exists():
        chosen = [s for s in samples if s.mask_kind == "random" and s.prompt]
        points = []
        for variant, scale in product(TRADED, SCALES):
            rows = []
            for seed in options.seeds:
                config = configuration(variant, seed, options.training_steps, options.work)
                rows += evaluate(make_drawer(options, config, free), chosen, scale=scale)
            found = summary(rows)
            ends = {f"{name}_{end}": getattr(found[name], end) for name in TRADED_FIGURES for end in ENDS}
            points.append({"variant": variant, "scale": scale, **ends, "n": len(rows)})
        write_json({"points": points}, kept)
    return json.loads(kept.read_text("utf-8"))["points"]


def table(rows: Mapping[str, Sequence[dict]]) -> list[dict]:
    """Return a row for each variant, kind of mask, with and without prompt: each figure's mean and interval."""
    lines = []
    for variant, found in rows.items():
        for mask, prompted in dict.fromkeys((row["mask"], row["prompted"]) for row in found):
            part = [row for row in found if (row["mask"], row["prompted"]) == (mask, prompted)]
            for name, estimate in without_seed(part).items():
                where = {"variant": variant, "mask": mask, "prompt": "yes" if prompted else "no"}
                lines.append({**where, "figure": name, **vars(estimate)})
    return lines


def differences(rows: Mapping[str, Sequence[dict]], base: str = BASE) -> list[dict]:
    """Return each variant's figures minus those of `base`, picture by picture: mean, interval, and the mean of each
    seed.
    """
    if base not in rows:
        return []
    lines = []
    for variant, found in rows.items():
        if variant in (base, "no control"):
            continue
        pairs = list(zip(found, rows[base], strict=True))
        groups = np.array([row["number"] for row, _ in pairs])
        for name in COMPARED:
            ours, theirs = (np.array([pair[i][name] for pair in pairs], float) for i in (0, 1))
            seeds = np.array([row["seed"] for row, _ in pairs])
            by_seed = [float(np.nanmean((ours - theirs)[seeds == seed])) for seed in np.unique(seeds)]
            spread = {"seeds": " ".join(f"{value:.6f}" for value in by_seed)}
            lines.append(
                {"variant": variant, "figure": name, **vars(paired(ours, theirs, groups=groups)), **spread}
            )
    return lines


def without_seed(rows: Sequence[dict]) -> dict[str, Estimate]:
    return summary([{name: value for name, value in row.items() if name != "seed"} for row in rows])


if __name__ == "__main__":
    sys.exit(main())
