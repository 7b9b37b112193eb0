"""python -m benchmarks.latency [--model embedded] [--adapter folder] [--engine folder ...] [--batch 1 8] [--size 128]

One picture with a masked control, end to end and stage by stage: this runtime, in torch and on engines, and diffusers'
StableDiffusionXLAdapterPipeline on the same weights, prompt, noise and scheduler, in one process and in turn. Writes
<out>/latency.csv and latency.png.

diffusers has no mask; it gets the same control everywhere, which is not more work.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline

from benchmarks import latency_plot
from benchmarks.measure import (
    DTYPE_HELP,
    check_out,
    default_dtypes,
    engine_name,
    environment,
    flops,
    interleave,
    matmul_rate,
    percentiles,
    results_folder,
    write_rows,
)
from runtime import LocalControlPipeline, Region
from runtime.cli.command import Parser, exit_code
from runtime.control.masks import box
from runtime.engines.manifest import read_manifest
from runtime.loading.load import EMBEDDED
from runtime.machine.arithmetic import DTYPES
from runtime.machine.device import pick_device
from runtime.model.attention import ATTENTIONS
from runtime.sampling.schedulers import make_scheduler

PROMPT = "a yellow star and a blue circle at night"
STAGES = ("text", "adapter", "denoise", "decode")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure every data type, size and batch, write, plot."""
    check_out(options.out)
    manifests = {folder: read_manifest(folder) for folder in options.engine}
    dtypes, rows = options.dtype or default_dtypes(pick_device(None)), []
    for folder, manifest in manifests.items():
        if manifest.precision not in dtypes:
            warnings.warn(
                f"engine {folder}: left out, it is in {manifest.precision}, which --dtype does not name",
                stacklevel=2,
            )
    for dtype in dtypes:
        adapters = {"canny": options.adapter} if options.adapter else None
        load = partial(LocalControlPipeline.from_pretrained, options.model, adapters, dtype=dtype)
        ours = variants(load, options)
        for folder, manifest in manifests.items():
            if manifest.precision == dtype:
                name = engine_name(f"localcontrol {manifest.target}", folder, ours)
                ours[name] = LocalControlPipeline.from_engine(folder)
        peak = matmul_rate(DTYPES[dtype], ours["localcontrol"].device)
        for size in options.size or [ours["localcontrol"].default_size]:
            for batch in options.batch:
                rows += measure(ours, dtype, batch, size, peak, options)
    write_rows(options.out / "latency.csv", rows)
    latency_plot.draw(rows, options.out / "latency.png")


def variants(load: Callable[..., LocalControlPipeline], options) -> dict[str, LocalControlPipeline]:
    """Return the pipeline in PyTorch, with every attention asked for, compiled, and on a GPU captured."""
    found = {"localcontrol": load()}
    base, on_gpu = found["localcontrol"], found["localcontrol"].device.type == "cuda"
    for name in options.attention:
        found[f"localcontrol {name}"] = LocalControlPipeline(base.model, base.adapters, attention=name)
    if on_gpu:
        captured = LocalControlPipeline(base.model, base.adapters)
        found["localcontrol cuda graph"] = captured.compile(compiler=None, cuda_graph=True)
    if options.compile:
        found["localcontrol compiled"] = load().compile(cuda_graph=on_gpu)
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.latency", description=__doc__.partition("\n\n")[2])
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
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help=DTYPE_HELP,
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, nargs="+", help="pixels, square (default: the model's own)")
    parser.add_argument("--guidance", type=float, default=5.0, help="1 for none (default 5)")
    parser.add_argument("--scheduler", default="euler", help="of both sides (default euler)")
    parser.add_argument("--compile", action="store_true", help="both sides with torch.compile too (minutes)")
    parser.add_argument("--attention", nargs="+", default=[], choices=ATTENTIONS, help="a row for each")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the CSV file")
    return parser


def measure(
    ours: dict[str, LocalControlPipeline], dtype: str, batch: int, size: int, peak: float, options
) -> list[dict]:
    """Return one row for each runtime.

    p20, p50, p80: of a call's time; first: of the first call at this size, which may compile. Of ours also the median
    of each stage, and of one step. memory_gib: the GPU's peak during the first call, empty on a CPU. tflops: the
    arithmetic of a call (text and control once) over p50; peak_share: of `matmul_rate`. times_ours: p50 over that of
    ours in torch.
    """
    torch_pipe = ours["localcontrol"]
    condition = (torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)) > 0.95).float()
    region = Region(condition, mask=box(size, size, (0, 0, size // 2, size)))
    call = {"height": size, "width": size}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in ours}

    def run(name: str) -> None:
        given = {"seed": 0, "images_per_prompt": batch, "steps": options.steps, "guidance": options.guidance}
        result = ours[name](PROMPT, [region], scheduler=options.scheduler, **given, **call)
        stages[name].append(result.timings)

    runs = {name: partial(run, name) for name in ours}
    runs |= diffusers_runs(torch_pipe, options, dtype, batch, condition, call)
    first: dict[str, float] = {}
    memory: dict[str, float | str] = dict.fromkeys(runs, "")
    on_gpu = torch_pipe.device.type == "cuda"
    for name, first_run in runs.items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        first_run()
        first[name] = time.perf_counter() - start
        if on_gpu:
            memory[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    work = flops(runs["localcontrol"])
    figures = {name: percentiles(times) for name, times in interleave(runs, options.repeats).items()}
    own, rows = figures["localcontrol"]["p50_ms"], []
    for name, figure in figures.items():
        rate = work / figure["p50_ms"] / 1e9
        print(f"{dtype} batch {batch} {name:32} {figure['p50_ms']:9.1f} ms, {rate:.3f} TFLOP/s", flush=True)
        what = {"model": options.model, "dtype": dtype, "batch": batch, "size": size, "steps": options.steps}
        what |= {"guidance": options.guidance, "scheduler": options.scheduler}
        of_peak = {
            "tflops": round(rate, 4),
            "peak_tflops": round(peak, 3),
            "peak_share": round(rate / peak, 3),
        }
        ratio = {"times_ours": round(figure["p50_ms"] / own, 3), "first_ms": round(first[name] * 1e3, 1)}
        ratio["memory_gib"] = memory[name]
        parts = stage_medians(stages.get(name, [])[-options.repeats :], options.steps)
        rows.append({"runtime": name, **what, **figure, **ratio, **parts, **of_peak, **versions()})
    return rows


def stage_medians(timings: list[dict[str, float]], steps: int) -> dict[str, float | str]:
    """Return milliseconds of each stage and of one step; empty for a pipeline that does not tell."""
    medians = {s: round(statistics.median(t[s] for t in timings) * 1e3, 3) if timings else "" for s in STAGES}
    step = round(medians["denoise"] / steps, 3) if timings else ""
    return {f"{stage}_ms": value for stage, value in medians.items()} | {"step_ms": step}


def versions() -> dict[str, str]:
    """`environment`, and the versions of what runs engines here."""
    found = {}
    for package in ("openvino", "onnxruntime"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return environment() | found


def diffusers_runs(
    ours: LocalControlPipeline, options, dtype: str, batch: int, condition: torch.Tensor, call: dict
) -> dict[str, Callable[[], None]]:
    """diffusers' pipeline in both layouts, compiled where that is asked for, with xformers where a GPU has it."""
    layouts = {"diffusers": torch.contiguous_format, "diffusers channels_last": torch.channels_last}
    pipes = {name: diffusers_pipeline(ours, options, dtype, layout) for name, layout in layouts.items()}
    if options.compile:
        compiled = diffusers_pipeline(ours, options, dtype, torch.channels_last)
        compiled.unet.compile()
        compiled.vae.decode = torch.compile(compiled.vae.decode)
        pipes["diffusers channels_last compiled"] = compiled
    if find_spec("xformers") and ours.device.type == "cuda":
        pipes["diffusers xformers"] = diffusers_pipeline(ours, options, dtype, torch.channels_last)
        pipes["diffusers xformers"].enable_xformers_memory_efficient_attention()
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    given = {
        "num_inference_steps": options.steps,
        "num_images_per_prompt": batch,
        "guidance_scale": options.guidance,
        "generator": generators,
        **call,
    }
    return {name: partial(pipe, PROMPT, image=condition, **given) for name, pipe in pipes.items()}


def diffusers_pipeline(ours, options, dtype: str, memory_format) -> StableDiffusionXLAdapterPipeline:
    """diffusers' pipeline from the same files, with its weights in `memory_format`."""
    folder = EMBEDDED if options.model == "embedded" else options.model
    base = StableDiffusionXLPipeline.from_pretrained(folder).to(ours.device, DTYPES[dtype])
    pipe = StableDiffusionXLAdapterPipeline(**base.components, adapter=ours.adapters["canny"])
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=memory_format)
    pipe.scheduler = make_scheduler(options.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    sys.exit(main())
