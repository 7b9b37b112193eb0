"""python -m benchmarks.full_size [--out folder] [--repeats 3] [--small]

SDXL's whole UNet (2.57 B parameters, random weights) in bf16, or in fp32 on a CPU that is slow in bf16: ours (as it is,
and packed as a pipeline on a CPU has it) against diffusers' in channels_last. Do they agree at full size, how long does
a forward of each take, at what share of the machine's rate? 512 x 512 pixels, batch 1, without and with control. Prints
one row and writes it to <out>/full_size.csv. Needs 7 GB of memory, packed 13; in fp32 twice that. --small tries a small
UNet. Exits with 1 where the relative RMS error is above 2e-2 in bf16, 1e-4 in fp32.
"""

import argparse
import json
import resource
import sys
from pathlib import Path

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.measure import (
    check_counts,
    check_out,
    environment,
    flops,
    interleave,
    matmul_rate,
    percentiles,
    results_folder,
    write_rows,
)
from runtime.cli.command import Parser, exit_code, say
from runtime.errors import InputError
from runtime.loading.single_file import SDXL_CONFIGS
from runtime.machine.arithmetic import DTYPES, half_precision, name_of
from runtime.model.blocks import Injection
from runtime.model.unet import UNet
from runtime.optimize.fused_qkv import fuse_qkv
from runtime.optimize.packed import pack_weights, packs_here

# Relative RMS error: two orders of the same roundings.
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
CPU = torch.device("cpu")
PIXELS = 512
# Of the random weights, each layer's output over its input. With 1, attention amplifies the roundings of bf16 to 2e-2
# in either model (against itself in float32); with 0.5 a wrong number of heads would stay below 2e-2.
GAIN = 0.8
SMALL = {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [1, 2, 2],
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 1600,
}


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 where the two differ; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.full_size", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the CSV file")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed forwards, after one that is not (default 3)"
    )
    parser.add_argument(
        "--small", action="store_true", help="a small UNet: tries this script, measures nothing"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="default: bf16, or fp32 where bf16 is slower"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Measure, print and write one row; return 1 where the two differ."""
    config = json.loads((SDXL_CONFIGS / "unet" / "config.json").read_text()) | (
        SMALL if options.small else {}
    )
    dtype = DTYPES[options.dtype] if options.dtype else half_precision(CPU)
    check_counts(repeats=options.repeats)
    check_out(options.out)
    row = measure(config, options.repeats, dtype, packs=fits(config, dtype))
    print(*(f"{key:>16}  {value}" for key, value in row.items()), sep="\n")
    write_rows(options.out / ("full_size_small.csv" if options.small else "full_size.csv"), [row])
    return int(max(row["error_free"], row["error_control"]) > LIMITS[dtype])


def fits(config: dict, dtype: torch.dtype) -> bool:
    """Return whether there is memory for a second, packed copy of the weights; without it "packed" is left out.

    Raises InputError where there is none for the weights and activations themselves.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet2DConditionModel.from_config(config).parameters())
    weights, free = parameters * dtype.itemsize, psutil.virtual_memory().available
    if 1.3 * weights > free:
        raise InputError(
            f"full_size in {name_of(dtype)}: needs {1.3 * weights / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are "
            "free; use another --dtype, or --small"
        )
    if 2.4 * weights > free:
        say(
            f"packed weights are left out: {2.4 * weights / 1e9:.0f} GB of memory needed, {free / 1e9:.0f} GB free"
        )
        return False
    return True


@torch.inference_mode()
def measure(config: dict, repeats: int, dtype: torch.dtype, packs: bool = True) -> dict:
    """Return one row: how far ours is from diffusers' on the same weights and packed from plain, the median time of a
    forward, the arithmetic of one and what share of `matmul_rate` packed weights reach, the memory before packing a
    copy.
    """
    reference = build(config, dtype)
    ours = UNet.from_diffusers(reference)  # the same tensors: a second copy would be another 5 GB
    x, control = make_inputs(reference.config, dtype)
    added = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]}
    projections = ours.embed_time(x["timesteps"], x["pooled"], x["time_ids"])
    once = [projection[0] for projection in projections], ours.project_text(x["text"])

    def run_reference(controlled: bool) -> Tensor:
        extra = [(s * m * f).to(f.dtype) for (f,), (m,), s in control] if controlled else None
        call = {
            "added_cond_kwargs": added,
            "down_intrablock_additional_residuals": extra,
            "return_dict": False,
        }
        return reference(x["sample"], x["timesteps"], x["text"], **call)[0]

    def run_ours(controlled: bool) -> Tensor:
        return ours(x["sample"], *once, control if controlled else None)

    errors = {}
    for name, controlled in (("free", False), ("control", True)):
        expected, actual = run_reference(controlled).float(), run_ours(controlled).float()
        errors[f"error_{name}"] = float(f"{((actual - expected).norm() / expected.norm()).item():.3g}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    work = flops(lambda: run_ours(True))
    runs = {"diffusers": lambda: run_reference(True), "ours": lambda: run_ours(True)}
    if packs:
        packed = UNet.from_diffusers(reference)
        if packs_here(dtype, CPU):
            pack_weights(fuse_qkv(packed))
        runs["packed"] = lambda: packed(x["sample"], *once, control)
    times = {name: percentiles(seconds)["p50_ms"] for name, seconds in interleave(runs, repeats).items()}
    best, expected, errors["error_packed"] = "packed" if packs else "ours", run_ours(True).float(), ""
    if packs:
        actual = runs["packed"]().float()
        errors["error_packed"] = float(f"{((actual - expected).norm() / expected.norm()).item():.3g}")
    rate, peak = work / times[best] / 1e9, matmul_rate(dtype, CPU)
    return {
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "pixels": PIXELS,
        "dtype": name_of(dtype),
        **errors,
        "output_rms": round(expected.square().mean().sqrt().item(), 4),
        "diffusers_ms": times["diffusers"],
        "ours_ms": times["ours"],
        "packed_ms": times.get("packed", ""),
        "times_faster": round(times["diffusers"] / times[best], 3),
        "tflop": round(work / 1e12, 3),
        "tflops": round(rate, 3),
        "peak_tflops": round(peak, 3),
        "peak_share": round(rate / peak, 3),
        "peak_memory_gib": round(memory, 2),
        **environment(),
    }


def build(
    config: dict, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU
) -> UNet2DConditionModel:
    """Return diffusers' UNet in `dtype`, made without a float32 copy.

    Its random weights keep activations near 1 (see GAIN).
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).to(dtype)
    unet.to_empty(device=device).eval()
    torch.manual_seed(0)
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.normal_(std=GAIN * module.weight[0].numel() ** -0.5)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight.fill_(1)
        if getattr(module, "bias", None) is not None:
            module.bias.normal_(std=0.1)
    return unet


def make_inputs(config: dict, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Injection]]:
    """Random latents, text and one region's features, masked to the left half: what a picture's first step sees."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    inputs = {
        "sample": random(1, config.in_channels, PIXELS // 8, PIXELS // 8),
        "timesteps": torch.tensor([500.0]),
        "text": random(1, 77, config.cross_attention_dim),
        "pooled": random(1, pooled),
        "time_ids": torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]]),
    }
    control = []
    channels = config.block_out_channels
    for width, stride in zip((*channels, channels[-1]), (16, 16, 32, 32), strict=True):
        size = PIXELS // stride
        mask = torch.zeros(1, 1, size, size)
        mask[..., : size // 2] = 1
        control.append(([random(1, width, size, size)], [mask], torch.tensor([0.8])))
    return inputs, control


if __name__ == "__main__":
    sys.exit(main())
