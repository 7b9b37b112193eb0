"""python -m training.embedded.build [--work out/embedded-build] [--out runtime/embedded]

Makes the embedded model from nothing: the autoencoder, then the UNet with its text encoders, then the canny
adapter, then its measures, card and sheet. Stop it at any moment and run it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import cv2
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from runtime.loading.quiet import quiet
from runtime.machine.report import commit
from training.embedded import adapter as adapter_stage
from training.embedded import base as base_stage
from training.embedded import vae as vae_stage
from training.embedded.card import write_card
from training.embedded.text import write_tokenizers

STAGES = ("vae", "base", "adapter", "card")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.embedded.build", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/embedded-build"), help="checkpoints and caches"
    )
    parser.add_argument("--out", type=Path, default=Path("runtime/embedded"), help="the model's folder")
    parser.add_argument("--until", choices=STAGES, default="card", help="the last stage to run")
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    build(args.work, args.out, STAGES.index(args.until))


def build(work: Path, out: Path, last: int = len(STAGES) - 1) -> None:
    made_by = commit()  # before the model's files, which are tracked, change
    work.mkdir(parents=True, exist_ok=True)
    vae, vae_run = vae_stage.train(work)
    if last == 0:
        return
    base, tokenizers, cache, base_run = base_stage.train(vae, work)
    if last == 1:
        return
    adapter, adapter_run = adapter_stage.train(base, tokenizers, cache, work)
    vae.register_to_config(scaling_factor=cache["scaling_factor"].item())
    if last == 2:
        return
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=base.text_encoders[0],
        text_encoder_2=base.text_encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=base.unet,
        scheduler=base_stage.make_scheduler(),
        force_zeros_for_empty_prompt=False,  # trained with the encoding of ""
        add_watermarker=False,
    )
    save(pipe, {"canny": adapter}, out)
    write_card(out, {run.name: run for run in (vae_run, base_run, adapter_run)}, made_by)


def save(pipe: StableDiffusionXLPipeline, adapters: dict[str, torch.nn.Module], out: Path) -> None:
    """Write the model in diffusers' folder layout, fp16 safetensors, in place of what is at ``out``."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    projection = vae_stage.fit_preview(pipe.vae)
    with quiet():
        pipe.to(torch.float16).save_pretrained(temporary)
    projection.write(temporary / "vae")
    write_tokenizers(temporary / "tokenizer", temporary / "tokenizer_2")
    _use_common_names(temporary / "text_encoder" / "model.safetensors")
    for name in ("text_encoder", "text_encoder_2"):
        _load_in_fp32(temporary / name / "config.json")
    for name, adapter in adapters.items():
        with quiet():
            adapter.half().save_pretrained(temporary / "adapters" / name)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)


def _use_common_names(path: Path) -> None:
    """Name the text encoder's weights as SDXL's own files do: transformers 5 reads both forms, 4 only that one."""
    prefix = "text_model."
    tensors = {name if name.startswith(prefix) else prefix + name: t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _load_in_fp32(path: Path) -> None:
    """Let transformers load a text encoder in fp32 unless told otherwise, as diffusers does the other parts."""
    config = json.loads(path.read_text())
    config.update(dict.fromkeys(config.keys() & {"dtype", "torch_dtype"}, "float32"))
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
