"""python -m benchmarks.presets [--steps 600] [--seeds 0 1] [--work out/presets]

Trains an adapter of the embedded model with every preset, from the same random weights for the same steps, and
measures edge errors inside and outside the mask on held-out scenes: presets.csv, and its loss curves as a plot.

All take the same data, batch, learning rate and schedule; "paper" keeps its own recipe but for steps and batch. Every
adapter is used as it was trained: "global" without a mask, "masked-input" with the condition blanked outside the mask,
the others with gated features. "none" is the model without control. Stop it at any moment and run it again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.measure import environment, results_folder, write_rows
from benchmarks.plot import plot_presets
from runtime import LocalControlPipeline, Region
from runtime.images import to_tensor
from runtime.report import write_json
from training import train_adapter
from training.config import PRESETS, TrainConfig, with_preset
from training.embedded.base import edges
from training.embedded.evaluate import held_out_scenes
from training.embedded.scenes import write_scenes
from training.embedded.vae import SIZE
from training.embedded.world import Scene, render
from training.masks import random_mask
from training.metrics import EdgeError
from training.stores import Entry
from training.validate import NAME, compare, draw, mean_errors

SCENES, HELD_OUT, BATCH = 4000, 48, 32
SAME = {
    "batch": BATCH, "accumulate": 1, "adapter_blocks": 1, "validate_every": 0, "save_every": 200, "keep": 1,
    "dtype": "bf16", "workers": 1,
}  # fmt: skip
TUNED = {"lr": 1e-3, "lr_schedule": "cosine", "warmup": 50, "beta2": 0.99, "ema": 0.99}
MASKS = TrainConfig(
    mask_shapes=("box", "circle"), mask_count=1, mask_min_area=0.15, mask_soft=0.0, mask_full=0.0
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.presets", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--work", type=Path, default=Path("out/presets"), help="data, cache, runs")
    args = parser.parse_args(argv)
    rows = [measured("none", 0, args.work, None)]
    for seed in args.seeds:
        for preset in args.presets:
            config = configuration(preset, seed, args.steps, args.work)
            trained(config, args.work)
            rows.append(measured(preset, seed, args.work, config))
            print({k: v for k, v in rows[-1].items() if k.startswith(("preset", "seed", "edge"))}, flush=True)
            write_rows(results_folder() / "presets.csv", rows)
    curves = {f"{r['preset']} {r['seed']}": loss_curves(Path(r["run"])) for r in rows[1:]}
    for row in rows:
        row.pop("run")
    write_rows(results_folder() / "presets.csv", rows)
    plot_presets(rows, curves, results_folder() / "presets.png")
    return 0


def configuration(preset: str, seed: int, steps: int, work: Path) -> TrainConfig:
    recipe = {} if preset == "paper" else TUNED
    paths = {
        "data": str(work / "scenes"),
        "cache": str(work / "cache"),
        "out": str(work / f"{preset}-{steps}-{seed}"),
    }
    return with_preset(preset, {**SAME, **recipe, **paths, "steps": steps, "seed": seed})


def trained(config: TrainConfig, work: Path) -> None:
    """Train, or go on, or do nothing where the run is done."""
    if not (work / "scenes" / f"{SCENES - 1:06d}.txt").exists():
        write_scenes(work / "scenes", SCENES)
    if not (Path(config.out) / "training.json").exists():
        train_adapter.train(config)


def measured(preset: str, seed: int, work: Path, config: TrainConfig | None) -> dict:
    """The row of one adapter; kept beside it, so that it is drawn with once."""
    folder = work / "none" if config is None else Path(config.out)
    kept = folder / "edge-errors.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        errors = held_out_errors(folder, config)
        write_json(errors, kept)
    errors = json.loads(kept.read_text())
    values = {name.replace("edge_error/", "edge_error_"): round(value, 6) for name, value in errors.items()}
    settings = {"steps": config.steps if config else 0, "batch": config.batch if config else 0}
    return {
        "preset": preset,
        "seed": seed,
        **settings,
        **values,
        "scenes": HELD_OUT,
        "run": str(folder),
        **environment(),
    }


def held_out_errors(folder: Path, config: TrainConfig | None) -> dict[str, float]:
    """Held-out scenes drawn with this run's adapter, or without control."""
    pipe = LocalControlPipeline.from_pretrained("embedded", None if config is None else {NAME: str(folder)})
    drawn: list[EdgeError] = []
    for i, scene in enumerate(held_out_scenes(HELD_OUT)):
        condition, mask = control(scene, i)
        entry = Entry("", "", scene.caption, (SIZE, SIZE))
        if config is None:
            image = pipe(scene.caption, [Region(condition[None], mask[None], scale=0.0)], seed=i).images[0]
        else:
            image = draw(pipe, entry, condition, mask, config, seed=i)
        drawn.append(compare(image, condition, mask, config or MASKS))
    return mean_errors(drawn)


def control(scene: Scene, i: int) -> tuple[Tensor, Tensor]:
    """The scene's edges (1, H, W) and a mask (1, H, W): the same ones for every preset."""
    condition = to_tensor(Image.fromarray(edges(render(scene, SIZE))))[0]
    return condition, random_mask(np.random.default_rng([7, i]), SIZE, SIZE, MASKS)[0]


def loss_curves(run: Path) -> dict[str, list[list[float]]]:
    """Each logged loss of a run as [step, value] pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run / "logs"), size_guidance={"scalars": 0})
    log.Reload()
    tags = [tag for tag in log.Tags()["scalars"] if tag.startswith("loss/")]
    return {tag: [[e.step, round(e.value, 6)] for e in log.Scalars(tag)] for tag in tags}


if __name__ == "__main__":
    sys.exit(main())
