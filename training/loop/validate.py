"""What the adapter draws while it is trained: held-out samples as a sheet, and their LFMSE."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

from runtime.control.conditions import preprocess
from runtime.control.png import save_png
from runtime.control.region import Region, pack
from runtime.control.sheet import make_sheet
from runtime.loading.load import Model
from runtime.pipeline import LocalControlPipeline
from training.config import TrainConfig
from training.data.rows import Rows
from training.data.stores import Entry, row_key
from training.loop.controls import pipeline_with
from training.metrics import LFMSE, lfmse_canny, lfmse_sobel

NAME = "trained"


class Validation:
    """Draws the held-out entries, always with the same masks and seeds, so that sheets can be compared."""

    def __init__(self, model: Model, rows: Rows, held_out: list[Entry], config: TrainConfig):
        self.model, self.rows, self.held_out, self.config = model, rows, held_out, config

    def run(self, control: nn.Module, path: Path) -> dict[str, float]:
        """Write the sheet of a T2I-Adapter or a ControlNet; return mean LFMSEs."""
        pipe = pipeline_with(self.model, NAME, control, self.config.backend)
        sheets, errors = [], []
        for i, entry in enumerate(self.held_out):
            condition, mask = self._control(entry, i)
            image = draw(pipe, entry, condition, mask, self.config, seed=i)
            errors.append(compare(image, condition, mask, self.config))
            said = f"{entry.caption} | LFMSE inside {errors[-1].inside:.5f}, outside {errors[-1].outside:.5f}"
            region = Region(condition[None], mask[None], NAME)
            sheets.append(make_sheet([image], pack([region], *mask.shape[1:]), said, i))
        save_png(stack(sheets), path)
        return mean_errors(errors)

    def _control(self, entry: Entry, i: int) -> tuple[Tensor, Tensor]:
        """Return the condition and a mask that is not the whole image, whatever the training's masks are."""
        rows = copy.copy(self.rows)
        rows.config = dataclasses.replace(self.config, control="features", mask_full=0.0)
        return rows.control(entry, row_key(entry.key, 0), np.random.default_rng([self.config.seed, 2, i]))


def draw(
    pipe: LocalControlPipeline, entry: Entry, condition: Tensor, mask: Tensor, config: TrainConfig, seed: int
) -> Image.Image:
    """Return the picture that the run's method makes of a condition (C, H, W) and a mask (1, H, W)."""
    region = control_region(config.control, condition, mask, NAME)
    height, width = entry.bucket
    settings = {"steps": config.validation_steps, "mask_resize": config.mask_resize}
    return pipe(entry.caption, [region], height=height, width=width, seed=seed, **settings).images[0]


def control_region(control: str, condition: Tensor, mask: Tensor, adapter: str, **fields) -> Region:
    """Return a condition (C, H, W) and a mask (1, H, W) as a method takes them; see `TrainConfig.control`.

    fields: more of the Region's.
    """
    if control in ("features", "controlnet"):
        return Region(condition[None], mask[None], adapter, **fields)
    shown = condition * mask if control == "input" else condition
    return Region(shown[None], None, adapter, **fields)


def compare(image: Image.Image, condition: Tensor, mask: Tensor, config: TrainConfig) -> LFMSE:
    """Return the errors of the picture's own condition against the one asked for."""
    made = np.asarray(preprocess(config.condition, image).convert("L"))
    wanted = (condition.mean(0) * 255).round().byte().numpy()
    lfmse = lfmse_sobel if config.condition == "sobel" else lfmse_canny
    return lfmse(made, wanted, mask[0].numpy())


def mean_errors(errors: list[LFMSE]) -> dict[str, float]:
    """Return means over the pictures, without those where the mask left nothing."""
    names = [field.name for field in dataclasses.fields(LFMSE)]
    values = {name: [getattr(e, name) for e in errors if not math.isnan(getattr(e, name))] for name in names}
    return {f"lfmse/{name}": float(np.mean(found)) for name, found in values.items() if found}


def stack(sheets: list[Image.Image]) -> Image.Image:
    """Return one below the other."""
    width, height = max(s.width for s in sheets), sum(s.height for s in sheets)
    whole, y = Image.new("RGB", (width, height), "white"), 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole
