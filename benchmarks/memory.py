"""python -m benchmarks.memory [--out folder]

The memory that SDXL takes on a GPU, by setting and size, one guided picture with one masked control in bf16: counted,
without a GPU. Every stage of a picture runs on tensors that have a shape and no values (PyTorch's "meta" device), with
the kernels' allocations and attention that keeps no matrix of weights; the bytes of all tensors alive at a time are
summed. What a GPU needs besides (its context, libraries' workspaces, gaps between blocks) is not: RESERVE is kept free
for it. Writes <out>/memory.csv, and the largest square picture for some GPUs to <out>/memory_largest.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # before Triton's import: kernels take tensors that are on no GPU

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import RESULTS, check_out, environment, write_rows
from benchmarks.random_sdxl import make_adapter, make_pipeline, read_config
from kernels import ops
from runtime.cli.command import Parser, exit_code
from runtime.control.features import Control
from runtime.control.levels import STRIDES
from runtime.loading.load import Model, from_diffusers
from runtime.loading.quiet import quiet
from runtime.optimize.fp8 import quantize
from runtime.optimize.fused import fuse_unet, fuse_vae
from runtime.sampling.denoiser import TorchDenoiser

DTYPE = torch.bfloat16
SIDES = (512, 768, 1024, 1536, 2048)
SETTINGS = {  # options of LocalControlPipeline.from_pretrained
    "plain": {},
    "vae_tiling": {"vae_tiling": True},
    "fp8-weights, vae_tiling": {"quantize": "fp8-weights", "vae_tiling": True},
    "offload model, vae_tiling": {"offload": "model", "vae_tiling": True},
    "offload group, vae_tiling": {"offload": "group", "vae_tiling": True},
}
GPUS = (8, 12, 16, 24)  # GB, as they are sold: 10^9 bytes is the least that such a GPU has
RESERVE = 1.0  # GB
GRID, LARGEST = 64, 4096  # pixels: what sides are multiples of, and where the search ends


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.memory", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="default %(default)s")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Count, search, write."""
    check_out(options.out)
    where = {key: value for key, value in environment().items() if key not in ("device", "threads")}
    rows = [row(name, side) | where for name in SETTINGS for side in SIDES]
    write_rows(options.out / "memory.csv", rows)
    found = [{"setting": name, **largest(name), "reserve_gb": RESERVE} | where for name in SETTINGS]
    write_rows(options.out / "memory_largest.csv", found)
    for line in (*rows, *found):
        print(*(f"{key} {value}" for key, value in line.items() if key not in where), sep=", ", flush=True)


def row(name: str, side: int) -> dict:
    """Return gigabytes of each stage at its height, weights included, and the peak of all."""
    figures = {f"{stage}_gb": round(size / 1e9, 3) for stage, size in count(name, side).items()}
    return {"setting": name, "side": side, **figures, "peak_gb": max(figures.values())}


def largest(name: str) -> dict:
    """Return for each of GPUS the largest side, in pixels, whose peak fits beside RESERVE; 0 where
    none of GRID does.
    """
    sides = {}
    for memory in GPUS:
        low, high = 0, LARGEST // GRID
        while low < high:
            middle = (low + high + 1) // 2
            fits = row(name, middle * GRID)["peak_gb"] <= memory - RESERVE
            low, high = (middle, high) if fits else (low, middle - 1)
        sides[f"gpu_{memory}_gb"] = low * GRID
    return sides


@cache
def count(name: str, side: int) -> dict[str, int]:
    """Return for each stage the most bytes of tensors that are on the GPU at a time."""
    parts, how = Parts(SETTINGS[name]), SETTINGS[name].get("offload")
    model = parts.model
    at_work = {"text": model.text_encoders, "adapter": (), "denoise": (model.unet,), "decode": (model.vae,)}
    flown = 0
    if how is None:
        at_work = dict.fromkeys(at_work, (*model.text_encoders, model.unet, model.vae))
    elif how == "group":  # one layer computes while the next one comes
        layers = [m for m in model.unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        flown, at_work["denoise"] = sum(sorted(map(size_of, layers))[-2:]), ()
    found = {}
    for stage, run in parts.stages(side).items():
        found[stage] = peak(run, (parts.adapter, *at_work[stage])) + (flown if stage == "denoise" else 0)
    return found


class Parts:
    """An SDXL without values, as a pipeline on a GPU would have it."""

    def __init__(self, options: dict):
        with quiet(), torch.device("meta"):
            unet = UNet2DConditionModel.from_config(read_config("unet"))
            pipe = make_pipeline(unet, DTYPE)
            self.adapter = make_adapter(unet.config.block_out_channels).to(DTYPE)
            pipe.vae.to(DTYPE)
        self.model: Model = from_diffusers(pipe)
        if options.get("quantize"):
            quantize(self.model.unet, options["quantize"])
        fuse_unet(self.model.unet)
        fuse_vae(self.model.vae).to(memory_format=torch.channels_last)
        if options.get("vae_tiling"):
            self.model.vae.enable_tiling()

    def stages(self, side: int) -> dict[str, Callable[[], object]]:
        """Return a guided picture's, one control."""
        latents, rows = side // 8, 2

        def text() -> object:
            ids = torch.zeros(rows, 77, dtype=torch.int64, device="meta")
            return [encoder(ids, output_hidden_states=True) for encoder in self.model.text_encoders]

        def adapter() -> list[Tensor]:
            return self.adapter(empty(1, 3, side, side))

        def denoise() -> Tensor:
            masks = [[empty(1, 1, -(-side // stride), -(-side // stride)).float()] for stride in STRIDES]
            strengths = torch.ones(30, len(STRIDES), 1, device="cpu")
            control = Control([[feature] for feature in adapter()], masks, strengths, "meta")
            given = empty(30), empty(rows, 77, 2048), empty(rows, 1280), empty(rows, 6), control, 1
            step = TorchDenoiser(self.model.unet).prepare(*given)
            return step(empty(rows, 4, latents, latents).float(), 0)

        def decode() -> Tensor:
            return self.model.vae.decode(empty(1, 4, latents, latents)).sample.float()

        return {"text": text, "adapter": adapter, "denoise": denoise, "decode": decode}


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="meta")


def size_of(module: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(module))


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@torch.inference_mode()
def peak(run: Callable[[], object], resident: Sequence[nn.Module]) -> int:
    """Return the most bytes of tensors that are alive at a time while `run` runs, those of `resident` included."""
    fused = mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q))
    with ops.use_backend("triton"), fused, Living() as living:
        for module in resident:
            living.note_all(module)
        run()
    return living.peak


class Living(TorchDispatchMode):
    """Counts the bytes of tensors from when an operation makes them until nothing holds them."""

    def __init__(self):
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count it, unless its memory is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def note_all(self, module: nn.Module) -> None:
        for tensor in tensors_of(module):
            self.note(tensor)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


if __name__ == "__main__":
    sys.exit(main())
