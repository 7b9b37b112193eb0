"""python -m benchmarks.training [--batch 8] [--steps 10] [--dtype fp32 bf16] [--full-size] [--out folder]

Training an adapter: this trainer's step against a step as in diffusers'
train_t2i_adapter_sdxl.py, which decodes images, encodes them with the VAE in float32 at every step and runs diffusers'
UNet eagerly; its text embeddings are cached, as there. Both in one process and in turn, loading included. Ours does
more: masks, and the loss on the edges of z0. Peak memory is each side's own, in a process of its own. Also how long
the loss takes, ours and one composed of kornia's filter and PyTorch, and its share of the step. Writes
<out>/training.csv.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import kornia
import torch
import torch.nn.functional as F
from diffusers import T2IAdapter

from benchmarks.measure import (
    DTYPE_HELP,
    check_counts,
    check_out,
    default_dtypes,
    environment,
    interleave,
    percentiles,
    results_folder,
    write_rows,
)
from benchmarks.training_world import DEVICE, World, embedded_parts, full_size_parts
from kernels import reference
from runtime.cli.command import Parser, exit_code
from runtime.machine.arithmetic import DTYPES, warn_if_slow
from runtime.machine.report import peak_memory
from runtime.model.unet import UNet
from training.config import TrainConfig
from training.loop.controls import new_adapter
from training.loop.loss import add_noise, training_loss, v_target
from training.loop.optimize import make_optimizer
from training.loop.step import LossOf

SIDES = ("localcontrol", "diffusers")
Step = Callable[[], None]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.training", description=__doc__.split("\n\n")[1])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), help=DTYPE_HELP)
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the CSV file")
    parser.add_argument(
        "--full-size", action="store_true", help="SDXL at 1024 x 1024, random weights: for a GPU"
    )
    parser.add_argument(
        "--small", action="store_true", help="tries --full-size: a small UNet, measures nothing"
    )
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure every data type, write, print."""
    check_out(options.out)
    check_counts(batch=options.batch, steps=options.steps)
    if options.memory_of:
        print(measured_memory(options.memory_of, options))
        return
    rows = []
    for dtype in options.dtype or default_dtypes(DEVICE):
        warn_if_slow(DTYPES[dtype], DEVICE)
        rows += measure(dtype, options)
    write_rows(options.out / table_name(options), rows)
    for row in rows:
        print(
            *(
                f"{key} {row[key]}"
                for key in ("side", "dtype", "samples_per_second", "ratio", "peak_gib", "loss_share")
            )
        )


def table_name(options: argparse.Namespace) -> str:
    """Return the file's name: what a small UNet took stands in no table of the full size."""
    kind = "-small" if options.small else "-full-size" if options.full_size else ""
    return f"training{kind}.csv"


def measure(dtype: str, options: argparse.Namespace) -> list[dict]:
    """Return a row for each side."""
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(options, dtype, Path(folder))
        times = interleave(sides, options.steps)
        losses = loss_times(options.batch, 128 if options.full_size else 16, options.steps)
    medians = {name: percentiles(seconds)["p50_ms"] for name, seconds in times.items()}
    rows = []
    for name, seconds in times.items():
        loss = percentiles(losses[name])["p50_ms"]
        row = {"side": name, "dtype": dtype, "batch": options.batch, **percentiles(seconds)}
        row["samples_per_second"] = round(1e3 * options.batch / medians[name], 1)
        row["ratio"] = round(medians["diffusers"] / medians[name], 2)
        row |= {"loss_ms": loss, "loss_share": round(loss / medians[name], 4)}
        rows.append(row | {"peak_gib": memory_in_process(name, dtype, options), **environment()})
    return rows


def make_sides(options: argparse.Namespace, dtype: str, folder: Path, names=SIDES) -> dict[str, Step]:
    """Return a function for each side that takes one step of its own adapter: same weights, data,
    batch and optimizer.
    """
    parts = full_size_parts if options.full_size or options.small else embedded_parts
    world = parts(options, dtype, folder)
    makers = {"localcontrol": our_step, "diffusers": diffusers_step}
    return {name: makers[name](world) for name in names}


def our_step(world: World) -> Step:
    model = SimpleNamespace(unet=UNet.from_diffusers(world.unet), scheduler=world.scheduler)
    adapter = _adapter(world)
    loss_of = LossOf(model, world.config)
    optimizer = make_optimizer(list(adapter.parameters()), world.config)

    def step() -> None:
        sum(term.mean() for term in loss_of(adapter, next(world.cached)).values()).backward()
        _update(adapter, optimizer)

    return step


def diffusers_step(world: World) -> Step:
    dtype, vae, abar = DTYPES[world.config.dtype], world.vae, world.scheduler.alphas_cumprod.to(DEVICE)
    # its own copy, in the layout that the script has; ours has laid the other out as channels_last
    unet = copy.deepcopy(world.unet).requires_grad_(False).to(memory_format=torch.contiguous_format)
    adapter = _adapter(world).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=world.config.lr)

    def step() -> None:
        pixels, condition, text, added = next(world.decoded)
        with torch.no_grad():
            latents = vae.encode(pixels.to(DEVICE)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = ((1 - torch.rand(len(latents), device=DEVICE) ** 3) * 1000).long().clamp(max=999)
        noisy, alpha, sigma = add_noise(latents, noise, abar[t])
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            residuals = [r.to(dtype) for r in adapter(condition.to(DEVICE))]
            output = unet(
                noisy.to(dtype),
                t,
                text,
                added_cond_kwargs=added,
                down_intrablock_additional_residuals=residuals,
            ).sample
        F.mse_loss(output.float(), v_target(latents, noise, alpha, sigma)).backward()
        _update(adapter, optimizer)

    return step


def loss_times(batch: int, side: int, repeats: int) -> dict[str, list[float]]:
    """Return seconds of the loss, forward and backward, by itself: ours, and of kornia's and PyTorch's functions."""
    output, latents, noise = (torch.randn(batch, 4, side, side, device=DEVICE) for _ in range(3))
    mask, t = torch.ones(batch, 1, side, side, device=DEVICE), torch.full((batch,), 500, device=DEVICE)
    abar, config = torch.full((batch,), 0.3, device=DEVICE), TrainConfig()
    noisy, alpha, sigma = add_noise(latents, noise, abar)
    output.requires_grad_()

    def ours() -> None:
        terms = training_loss(output, noisy, latents, noise, mask, t, abar, "v_prediction", config)
        torch.autograd.grad(sum(x.mean() for x in terms.values()), output)

    def composed() -> None:
        predicted = reference.predict_z0(output, noisy, alpha, sigma, "v_prediction")
        edges = [kornia.filters.sobel(z) * mask for z in (predicted, latents)]
        loss = F.mse_loss(output, v_target(latents, noise, alpha, sigma)) + config.z0_weight * F.mse_loss(
            *edges
        )
        torch.autograd.grad(loss, output)

    return interleave({"localcontrol": ours, "diffusers": composed}, max(20, repeats))


def memory_in_process(side: str, dtype: str, options: argparse.Namespace) -> float:
    """Return peak memory in GiB of three steps of one side: resident on a CPU, allocated on a GPU."""
    command = [sys.executable, "-m", "benchmarks.training", "--memory-of", side, "--dtype", dtype]
    command += [
        "--batch",
        str(options.batch),
        *["--full-size"] * options.full_size,
        *["--small"] * options.small,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def measured_memory(side: str, options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        step = make_sides(options, options.dtype[0], Path(folder), names=(side,))[side]
        for _ in range(3):
            step()
    peak = peak_memory(DEVICE)
    return round((peak.get("gpu") or peak["ram"]) / 2**30, 2)


def _adapter(world: World) -> T2IAdapter:
    torch.manual_seed(0)
    adapter = new_adapter(world.channels, world.config.condition_channels, world.config.adapter_blocks)
    return adapter.to(DEVICE, memory_format=torch.channels_last)


def _update(adapter: T2IAdapter, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(main())
