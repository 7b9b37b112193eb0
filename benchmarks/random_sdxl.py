"""python -m benchmarks.random_sdxl --out FOLDER [--dtype bf16] [--small]

An SDXL of full size with random weights, in diffusers' layout, and an adapter: FOLDER/model and FOLDER/adapter, 7 GB.
What takes time and memory does not depend on the weights' values, and none have to be downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, T2IAdapter
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.full_size import SMALL, build
from benchmarks.measure import check_out
from runtime.cli.command import Parser, exit_code
from runtime.loading.load import EMBEDDED
from runtime.loading.single_file import SDXL_CONFIGS
from runtime.machine.arithmetic import DTYPES
from training.embedded.text import make_tokenizers

SMALL_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 64,
}


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.random_sdxl", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of all but the VAE, which is fp32")
    parser.add_argument("--small", action="store_true", help="a small model: tries this script")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    check_out(options.out)
    save(options.out / "model", options.out / "adapter", options.dtype, options.small)


@torch.no_grad()
def save(model: Path, adapter: Path, dtype: str, small: bool) -> None:
    """Write model and adapter in `dtype`, the VAE in fp32."""
    unet = build(read_config("unet") | (SMALL if small else {}))
    make_pipeline(unet, DTYPES[dtype], small).save_pretrained(model)
    make_adapter(unet.config.block_out_channels).to(DTYPES[dtype]).save_pretrained(adapter)


def make_pipeline(unet: nn.Module, dtype: torch.dtype, small: bool = False) -> StableDiffusionXLPipeline:
    """Return everything around a UNet; text encoders and UNet in `dtype`. Made on the device that
    is the default one.
    """
    vae = AutoencoderKL.from_config(read_config("vae"))
    encoders = [make_encoder(name, dtype, small) for name in ("text_encoder", "text_encoder_2")]
    with torch.device("cpu"):  # where it keeps its numbers, whatever the default
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tokenizers = make_tokenizers(EMBEDDED / "tokenizer")
    return StableDiffusionXLPipeline(
        vae, *encoders, *tokenizers, unet.to(dtype), scheduler, add_watermarker=False
    )


def make_adapter(channels: list[int]) -> T2IAdapter:
    """Return an adapter for a UNet of these channels, of the size that those for SDXL have."""
    options = {"num_res_blocks": 2, "downscale_factor": 16, "adapter_type": "full_adapter_xl"}
    return T2IAdapter(in_channels=3, channels=[*channels, channels[-1]], **options)


def make_encoder(name: str, dtype: torch.dtype, small: bool = False) -> nn.Module:
    """Return a text encoder of SDXL's configuration, its weights random."""
    values = read_config(name) | (SMALL_TEXT if small else {})
    kind = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
    with torch.device("meta"):
        encoder = kind(CLIPTextConfig(**values)).to(dtype)
    device = torch.get_default_device()
    if device.type != "meta":
        encoder.to_empty(device=device)
        encoder.init_weights()
    return encoder.eval()


def read_config(name: str) -> dict:
    """diffusers' or transformers' config of a part of SDXL."""
    return json.loads((SDXL_CONFIGS / name / "config.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
