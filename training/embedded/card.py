# ruff: noqa: E501 -- a row of a Markdown table is one line
"""The embedded model's card: what it was made from, how long it took, and what was measured on the saved files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from runtime.machine.arithmetic import half_precision, name_of
from runtime.machine.report import commit, device_name, versions
from runtime.pipeline import LocalControlPipeline
from training.embedded import adapter as adapter_stage
from training.embedded import base as base_stage
from training.embedded import vae as vae_stage
from training.embedded.evaluate import control_scores, held_out_scenes, prompt_score, vae_psnr
from training.embedded.stage import DEVICE, Stage
from training.embedded.words import words_scores

PROMPTS = 200
CONTROLLED = 48


def write_card(folder: Path, runs: Mapping[str, Stage], made_by: str) -> None:
    """Measure the model in ``folder`` as users get it, and write README.md, measures.json and sheet.png there.

    made_by: the commit of the code that made it.
    """
    pipe = LocalControlPipeline.from_pretrained(
        folder, {"canny": folder / "adapters" / "canny"}, device=DEVICE, dtype="fp32"
    )
    score, images = prompt_score(pipe, PROMPTS)
    control = control_scores(pipe, CONTROLLED)
    measures = {
        "vae_psnr_db": vae_psnr(pipe.model.vae),
        "prompts_shown": score,
        "prompts": PROMPTS,
        "edge_error": {name: vars(value) for name, value in control.items()},
        "edge_error_scenes": CONTROLLED,
        "words": measure_words(pipe),
        "training_minutes": {name: run.seconds / 60 for name, run in runs.items()},
        "steps": {name: run.step for name, run in runs.items()},
        "megabytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6,
        "device": f"{device_name(DEVICE)}, {torch.get_num_threads()} threads",
        "arithmetic": f"{name_of(half_precision(DEVICE))} arithmetic",
        "versions": versions(),
        "commit": made_by,
    }
    sheet(images[:16], [scene.caption for scene in held_out_scenes(16)]).save(
        folder / "sheet.png", optimize=True
    )
    (folder / "measures.json").write_text(json.dumps(measures, indent=2) + "\n")
    (folder / "README.md").write_text(_text(measures))


def measure_words(pipe: LocalControlPipeline) -> dict:
    """Return how local regions' words are, beside one prompt that says the same; see `words.words_scores`."""
    scores = words_scores(pipe, PROMPTS)
    device = f"{device_name(DEVICE)}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "commit": commit(),
        "pictures": PROMPTS,
        "scores": {name: asdict(score) for name, score in scores.items()},
    }


def sheet(images: list[Image.Image], captions: list[str], columns: int = 4) -> Image.Image:
    """Return the pictures in a grid, each over its prompt."""
    width, height, line = 260, 128, 15
    rows = -(-len(images) // columns)
    board = Image.new("RGB", (columns * width, rows * (height + 3 * line)), "white")
    draw = ImageDraw.Draw(board)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * width, i // columns * (height + 3 * line)
        board.paste(image, (x + (width - image.width) // 2, y + 4))
        for k, text in enumerate(_wrap(caption)):
            draw.text((x + width / 2, y + height + 8 + k * line), text, "black", anchor="ma")
    return board


def _wrap(caption: str, limit: int = 38) -> list[str]:
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) > limit:
            lines.append("")
        lines[-1] += word + " "
    return [line.strip() for line in lines]


def _text(m: Mapping) -> str:
    error = m["edge_error"]
    rows = "\n".join(
        f"| {label} | {error[name]['inside']:.5f} | {error[name]['outside']:.5f} |"
        for name, label in (
            ("none", "no control"),
            ("everywhere", "control everywhere"),
            ("masked", "control in the left half only"),
        )
    )
    words = "\n".join(
        f"| {name} | {score['inside']:.1%} | {score['kept_out']:.1%} | {score['local']:.1%} |"
        for name, score in m["words"]["scores"].items()
    )
    minutes = m["training_minutes"]
    return f"""# The embedded model

SDXL's structure (two text encoders, added time ids, three-level UNet, VAE factor 8, adapter strides 16 and 32) with
small widths: {m["megabytes"]:.1f} MB of fp16 safetensors in diffusers' folder layout, for 128 x 128 pictures. It knows one
small world, coloured shapes on plain backgrounds, and is here so that everything in this repository can be run, tested
and measured without a download. It knows nothing else. Licence: Apache-2.0, like the code.

![16 held-out prompts, seeds 0 to 15](sheet.png)

## How it was made

`python -m training.embedded.build` at commit {m["commit"]}, from random weights, on procedurally drawn scenes
(`training/embedded/world.py`): 8 shapes x 8 colours x 5 backgrounds, 1 to 3 objects. No other data.

| stage | trained on | steps x batch | minutes |
|---|---|---|---|
| autoencoder | scenes of 2 to 5 objects, a new one every time | {m["steps"]["vae"]:,} x {vae_stage.BATCH} | {minutes["vae"]:.0f} |
| UNet and text encoders, v prediction | {base_stage.SCENES:,} captioned scenes | {m["steps"]["base"]:,} x {base_stage.BATCH} | {minutes["base"]:.0f} |
| canny adapter: masked features, {adapter_stage.EDGES.capitalize()} z0 loss, weight {adapter_stage.LAMBDA:g} | the same, random masks | {m["steps"]["adapter"]:,} x {adapter_stage.BATCH} | {minutes["adapter"]:.0f} |

On {m["device"]}, {m["arithmetic"]}, torch {m["versions"]["torch"]}, diffusers {m["versions"]["diffusers"]}.

## Measured

On held-out scenes, each with a (shape, colour) pair that no training scene shows; the saved fp16 files run in fp32,
30 steps, guidance 5 (`training/embedded/evaluate.py`, figures in `measures.json`).

- Autoencoder: {m["vae_psnr_db"]:.1f} dB PSNR (200 scenes).
- Pictures that show every colour asked for and the background asked for: {m["prompts_shown"]:.1%} of {m["prompts"]} prompts.
- Edge error against the condition (blurred edges, mean squared difference, lower is better), {m["edge_error_scenes"]} scenes; the mask
  is the left half. Outside it, a control that is local leaves the error at the level of no control; what the gate
  cannot hold back, the UNet carries across (benchmarks/quality/README.md in the repository):

| | inside | outside |
|---|---|---|
{rows}

- Words of regions: two things of two colours, the one in the left and the other in the right half, {m["words"]["pictures"]} pictures;
  where the first one's colour is shown. One prompt cannot say where. Words for one half alone are hardly followed: a
  model this small takes the number of things from the prompt.

| | in its half | not in the other | both |
|---|---|---|---|
{words}
"""
