"""python -m benchmarks.lossy [--model embedded] [--engine folder ...] [--count 32] [--out folder]

What faster settings cost: the time of a picture, all settings in turn, and how far its latents and its edges are from
those of the lossless picture of the same seed; and whether it keeps to condition and prompt as well. Held-out scenes of
the embedded model's world, a random mask each. The lossless picture is PyTorch's in fp32; the rows "bf16" and of
engines have the same settings: what another rounding does is the yardstick; float8's is a coarser one. Writes
<out>/lossy.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import (
    check_counts,
    check_out,
    engine_name,
    environment,
    interleave,
    percentiles,
    results_folder,
    write_rows,
)
from benchmarks.quality.bootstrap import interval
from benchmarks.quality.samples import Sample, held_out_samples
from runtime import LocalControlPipeline
from runtime.cli.command import Parser, exit_code, say
from runtime.control.conditions import preprocess
from runtime.engines.manifest import read_manifest
from runtime.machine.arithmetic import is_quick
from runtime.optimize.fp8 import multiplies_here
from runtime.sampling.result import Result
from training.embedded.shapes import adherence
from training.loop.validate import control_region
from training.metrics import lfmse_canny

STEPS = 30
SETTINGS: Mapping[str, dict] = {  # of the pipeline's call
    "lossless": {},
    "guidance in steps 0 to 80 %": {"guidance_range": (0.0, 0.8)},
    "guidance in steps 0 to 60 %": {"guidance_range": (0.0, 0.6)},
    "guidance in steps 0 to 40 %": {"guidance_range": (0.0, 0.4)},
    "guidance in steps 20 to 80 %": {"guidance_range": (0.2, 0.8)},
    "no guidance": {"guidance": 1.0},
    "20 steps": {"steps": 20},
    "10 steps": {"steps": 10},
    "10 steps, dpm++2m": {"steps": 10, "scheduler": "dpm++2m"},
    "deep features every 2nd step": {"cache_interval": 2},
    "deep features every 3rd step": {"cache_interval": 3},
    "deep features every 5th step": {"cache_interval": 5},
}
# figure -> of the picture and the lossless one, or of the picture alone
FIGURES = ("latents_rms", "lfmse_inside", "lfmse_outside", "condition_lfmse_inside", "shapes", "colours")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.lossy", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--model", default="embedded", help="what runtime.generate's --model takes")
    parser.add_argument(
        "--engine", nargs="+", default=[], metavar="FOLDER", help="of export.build_engine: a row each"
    )
    parser.add_argument("--count", type=int, default=32, help="scenes (default 32)")
    parser.add_argument("--repeats", type=int, default=7, help="timed pictures of each setting (default 7)")
    parser.add_argument("--out", type=Path, default=results_folder(), help="default %(default)s")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Draw every sample with every setting, compare, time, write."""
    check_out(options.out)
    check_counts(count=options.count, repeats=options.repeats)
    manifests = {folder: read_manifest(folder) for folder in options.engine}
    pipe = LocalControlPipeline.from_pretrained(options.model, dtype="fp32")
    samples = list(held_out_samples(options.count, ("random",)))
    lossless = [draw(pipe, sample) for sample in samples]
    found = {name: compare(pipe, setting, samples, lossless) for name, setting in SETTINGS.items()}
    quantized = {"bf16": None, "bf16, fp8": "fp8", "bf16, fp8-weights": "fp8-weights"}
    if not is_quick(torch.bfloat16, pipe.device):
        say("rows in bf16 are left out: this CPU is slower in it than in fp32")
        quantized = {}
    elif not multiplies_here(pipe.device):
        say(f"fp8 is left out: torch {torch.__version__} has no row-wise float8 product on {pipe.device}")
        del quantized["bf16, fp8"]
    rounded = {
        name: LocalControlPipeline.from_pretrained(options.model, dtype="bf16", quantize=quantize)
        for name, quantize in quantized.items()
    }
    for folder, manifest in manifests.items():
        name = engine_name(f"{manifest.target} {manifest.precision}", folder, rounded)
        rounded[name] = LocalControlPipeline.from_engine(folder)
    found |= {name: compare(other, {}, samples, lossless) for name, other in rounded.items()}
    pipes = dict.fromkeys(SETTINGS, pipe) | rounded
    runs = {name: partial(draw, own, samples[0], **SETTINGS.get(name, {})) for name, own in pipes.items()}
    times = {name: percentiles(seconds) for name, seconds in interleave(runs, options.repeats).items()}
    what = {"model": options.model, **environment()}
    rows = []
    for name, time in times.items():
        faster = {"times_faster": round(times["lossless"]["p50_ms"] / time["p50_ms"], 3)}
        rows.append({"setting": name, **time, **faster, **found[name], "n": len(samples), **what})
        print(
            f"{name:30} {faster['times_faster']:5.2f} x, latents {found[name]['latents_rms_mean']:.4f}",
            flush=True,
        )
    write_rows(options.out / "lossy.csv", rows)


def draw(pipe: LocalControlPipeline, sample: Sample, **setting) -> Result:
    """Return the sample with its control in its mask, seeded by its number."""
    region = control_region("features", sample.condition, sample.mask, "canny")
    height, width = sample.mask.shape[1:]
    call = {"steps": STEPS, "seed": sample.number, "height": height, "width": width}
    return pipe(sample.prompt, [region], **{**call, **setting})


def compare(
    pipe: LocalControlPipeline, setting: Mapping, samples: Sequence[Sample], lossless: Sequence[Result]
) -> dict[str, float]:
    """Return mean and 95 % interval of each of FIGURES over the samples."""
    rows = [measure(draw(pipe, s, **setting), exact, s) for s, exact in zip(samples, lossless, strict=True)]
    line = {}
    for name in FIGURES:
        estimate = interval(np.array([row[name] for row in rows], float))
        line |= {f"{name}_{end}": round(getattr(estimate, end), 6) for end in ("mean", "low", "high")}
    return line


def measure(made: Result, exact: Result, sample: Sample) -> dict[str, float]:
    """latents_rms: of the difference, over the lossless latents' RMS. lfmse: between both pictures' edges."""
    mask = sample.mask[0].numpy()
    own, theirs = (np.asarray(preprocess("canny", r.images[0]).convert("L")) for r in (made, exact))
    wanted = (sample.condition.mean(0) * 255).round().byte().numpy()
    error, shown = lfmse_canny(own, theirs, mask), adherence(np.asarray(made.images[0]), sample.scene)
    rms = (made.latents - exact.latents).square().mean().sqrt() / exact.latents.square().mean().sqrt()
    return {
        "latents_rms": rms.item(),
        "lfmse_inside": error.inside,
        "lfmse_outside": error.outside_wanted,
        "condition_lfmse_inside": lfmse_canny(own, wanted, mask).inside,
        "shapes": shown.shapes,
        "colours": shown.colours,
    }


if __name__ == "__main__":
    sys.exit(main())
