"""python -m benchmarks.latency [--model embedded] [--adapter folder] [--engine folder ...] [--steps 30] [--out folder]

One picture with a masked control, end to end: this runtime, in torch and on engines, and diffusers'
StableDiffusionXLAdapterPipeline on the same weights, prompt, noise and scheduler, in one process and in turn. Writes
<out>/latency.csv.

diffusers has no mask; it gets the same control everywhere, which is not more work.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline

from benchmarks.measure import environment, interleave, percentiles, results_folder, write_rows
from runtime import LocalControlPipeline, Region
from runtime.loading import DTYPES, EMBEDDED
from runtime.manifest import read_manifest
from runtime.masks import box

PROMPT = "a yellow star and a blue circle at night"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--model", default="embedded", help="what runtime.generate's --model takes")
    parser.add_argument(
        "--adapter", help="what runtime.generate's --adapter takes (default: the model's canny)"
    )
    parser.add_argument(
        "--engine",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="compiled from the model by export.build_engine",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, help="pixels, square (default: the model's own)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the CSV file")
    options = parser.parse_args(arguments)
    rows = []
    for dtype in options.dtype:
        adapters = {"canny": options.adapter} if options.adapter else None
        ours = {"localcontrol": LocalControlPipeline.from_pretrained(options.model, adapters, dtype=dtype)}
        for folder in options.engine:
            manifest = read_manifest(folder)
            if manifest.precision == dtype:
                ours[f"localcontrol {manifest.target}"] = LocalControlPipeline.from_engine(folder)
        for batch in options.batch:
            rows += measure(ours, dtype, batch, options)
    write_rows(options.out / "latency.csv", rows)


def measure(
    ours: dict[str, LocalControlPipeline], dtype: str, batch: int, options: argparse.Namespace
) -> list[dict]:
    """One row for each runtime: percentiles of the time, and its median over that of ours in torch."""
    torch_pipe = ours["localcontrol"]
    size = options.size or torch_pipe.default_size
    condition = (torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)) > 0.95).float()
    region = Region(condition, mask=box(size, size, (0, 0, size // 2, size)))
    call = {"height": size, "width": size}

    def run(pipe: LocalControlPipeline) -> None:
        pipe(
            PROMPT, [region], steps=options.steps, seed=0, images_per_prompt=batch, scheduler="euler", **call
        )

    runs = {name: partial(run, pipe) for name, pipe in ours.items()}
    for layout, memory_format in (("", torch.contiguous_format), (" channels_last", torch.channels_last)):
        theirs = diffusers_pipeline(torch_pipe, options, dtype, memory_format)
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        runs[f"diffusers{layout}"] = lambda pipe=theirs, generators=generators: pipe(
            PROMPT,
            image=condition,
            num_inference_steps=options.steps,
            num_images_per_prompt=batch,
            generator=generators,
            **call,
        )
    figures = {name: percentiles(times) for name, times in interleave(runs, options.repeats).items()}
    own = figures["localcontrol"]["p50_ms"]
    rows = []
    for name, figure in figures.items():
        ratio = round(figure["p50_ms"] / own, 3)
        print(
            f"{dtype} batch {batch} {name:24} {figure['p50_ms']:9.1f} ms, {ratio:.2f} x localcontrol's time"
        )
        what = {"model": options.model, "dtype": dtype, "batch": batch, "size": size, "steps": options.steps}
        rows.append({"runtime": name, **what, **figure, "times_ours": ratio, **environment()})
    return rows


def diffusers_pipeline(ours, options, dtype: str, memory_format) -> StableDiffusionXLAdapterPipeline:
    """diffusers' pipeline from the same files, with its weights in `memory_format`."""
    folder = EMBEDDED if options.model == "embedded" else options.model
    base = StableDiffusionXLPipeline.from_pretrained(folder).to(ours.device, DTYPES[dtype])
    pipe = StableDiffusionXLAdapterPipeline(**base.components, adapter=ours.adapters["canny"])
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=memory_format)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    main()
