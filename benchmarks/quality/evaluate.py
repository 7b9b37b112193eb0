"""Draw samples with control, and beside each the free picture of the same seed; measure every pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.quality import locality
from benchmarks.quality.bootstrap import Estimate, interval
from benchmarks.quality.distribution import feature_distance, vae_features
from benchmarks.quality.samples import Sample
from runtime.control.conditions import preprocess
from runtime.control.features import Control
from runtime.control.masks import mask_pyramid
from runtime.control.region import Region, pack
from runtime.pipeline import LocalControlPipeline
from training.embedded.shapes import adherence
from training.loop.validate import control_region
from training.metrics import diffcc, lfmse_canny, lfmse_sobel

LEAKAGE_BINS = (0, 4, 8, 16, 32, 64)  # px from the mask's border
KEYS = ("number", "mask", "prompted")  # of a row of measures; all else is a figure


@dataclass
class Drawer:
    """Draws a sample with one adapter, used as one method uses it.

    control: what the mask gates, as in training: "features", "input" (the condition is blanked outside) or
    "everywhere"; "none" draws without control.
    free: pictures without control, by prompt and seed; those of another drawer of the same model may be handed in.
    """

    pipe: LocalControlPipeline
    adapter: str
    control: str = "features"
    mask_resize: str = "area"
    steps: int = 30
    free: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def __call__(self, sample: Sample, seed: int | None = None, **region) -> np.ndarray:
        """Return (H, W, 3) uint8; the seed is the sample's number unless given. region: more fields of its Region."""
        if self.control == "none":
            return self.free_picture(sample, seed)
        shown = control_region(self.control, sample.condition, sample.mask, self.adapter, **region)
        return self._draw(sample, [shown], sample.number if seed is None else seed)

    def free_picture(self, sample: Sample, seed: int | None = None) -> np.ndarray:
        """Return the same picture without control, drawn once for all masks."""
        seed = sample.number if seed is None else seed
        key = sample.prompt, seed
        if key not in self.free:
            self.free[key] = self._draw(sample, [], seed)
        return self.free[key]

    @torch.inference_mode()
    def injected_outside(self, sample: Sample) -> float:
        """Return what is added to the UNet where the mask is 0, over what is where it is 1: RMS of the gated features
        of all levels. This path of leakage does not depend on what the UNet makes of it; NaN without an inside or
        outside.
        """
        if self.control == "none":
            return 0.0
        shown = control_region(self.control, sample.condition, sample.mask, self.adapter)
        levels = Control.build(
            pack([shown], *sample.mask.shape[1:]),
            self.pipe.adapters,
            1,
            device=self.pipe.device,
            dtype=self.pipe.dtype,
            channels=self.pipe.denoiser.control_channels,
            mode=self.mask_resize,
        ).gated(0)
        masks = mask_pyramid(sample.mask[None], [tuple(level.shape[2:]) for level in levels])
        outside, inside = (
            torch.cat([g.square()[(m == value).expand_as(g)] for g, m in zip(levels, masks, strict=True)])
            for value in (0, 1)
        )
        return float((outside.mean() / inside.mean()).sqrt())

    def _draw(self, sample: Sample, regions: list[Region], seed: int) -> np.ndarray:
        height, width = sample.mask.shape[1:]
        size = {"height": height, "width": width}
        result = self.pipe(
            sample.prompt, regions, steps=self.steps, seed=seed, mask_resize=self.mask_resize, **size
        )
        return np.asarray(result.images[0].convert("RGB"))


def evaluate(
    drawer: Drawer,
    samples: Iterable[Sample],
    condition: str = "canny",
    vae: AutoencoderKL | None = None,
    keep: Callable[[Sample, np.ndarray, np.ndarray], None] | None = None,
    **region,
) -> Iterator[dict]:
    """Yield a row of measures for every sample. keep: is shown each sample with its picture and its free picture.

    vae: whose encoder's features measure distances as LPIPS does; without it there is no `perceptual` column.
    region: more fields of the samples' Regions.
    """
    features = None if vae is None else vae_features(vae)
    for sample in samples:
        image, free = drawer(sample, **region), drawer.free_picture(sample)
        if keep is not None:
            keep(sample, image, free)
        row = {"number": sample.number, "mask": sample.mask_kind, "prompted": bool(sample.prompt)}
        row["injected_outside"] = drawer.injected_outside(sample)
        yield row | measure(image, free, sample, condition, features)


def measure(
    image: np.ndarray, free: np.ndarray, sample: Sample, condition: str = "canny", features=None
) -> dict:
    """Return all figures of one picture (H, W, 3) uint8; free: the one without control, of the same seed."""
    mask = sample.mask[0].numpy()
    found = follows(image, sample, condition, mask)
    curve = locality.leakage(image, free, mask, (*LEAKAGE_BINS, np.inf))
    found["leakage"] = locality.leakage_total(image, free, mask)
    found |= {f"leakage_{near}px": value for near, value in zip(LEAKAGE_BINS, curve.tolist(), strict=True)}
    found["seam"] = locality.seam(image, free, mask)
    if features is not None:
        # only what differs outside: inside, both show the same
        outside = np.where(mask[..., None] > 0, free, image)
        found["perceptual"] = feature_distance([outside], [free], features)[0]
    if sample.scene is not None and sample.prompt:
        shown = adherence(image, sample.scene)
        found |= {"colours": shown.colours, "shapes": shown.shapes, "background": float(shown.background)}
    return found


def follows(image: np.ndarray, sample: Sample, condition: str, mask: np.ndarray) -> dict[str, float]:
    """Return how well the picture keeps to its condition: by the original's measures, and by edges and SSIM."""
    wanted = (sample.condition.mean(0) * 255).round().byte().numpy()
    made = _map(condition, image)
    lfmse = lfmse_canny(made, wanted, mask)
    found = {f"lfmse_{name}": value for name, value in vars(lfmse).items()}
    if sample.picture is not None:
        sobel = lfmse_sobel(_map("sobel", image), _map("sobel", sample.picture), mask)
        found |= {f"sobel_{name}": value for name, value in vars(sobel).items()}
    found |= vars(diffcc(made, wanted, mask))
    found |= vars(locality.edge_scores(made, wanted, mask))
    return found | {"ssim": locality.masked_ssim(made, wanted, mask)}


def diversity(
    draw: Callable[[Sample, int], np.ndarray], samples: Iterable[Sample], seeds: Sequence[int]
) -> Iterator[dict]:
    """Yield how much pictures of several seeds differ outside the mask and inside. draw: a `Drawer`, or its
    free_picture.
    """
    for sample in samples:
        mask, pictures = sample.mask[0].numpy(), [draw(sample, seed) for seed in seeds]
        yield {
            "number": sample.number,
            "mask": sample.mask_kind,
            "diversity_outside": locality.diversity(pictures, mask),
            "diversity_inside": locality.diversity(pictures, 1 - mask),
        }


def summary(rows: Sequence[dict]) -> dict[str, Estimate]:
    """Return the mean of every figure with its interval; pictures of one scene count as one group."""
    names = dict.fromkeys(name for row in rows for name in row if name not in KEYS)
    groups = np.array([row["number"] for row in rows])
    return {
        name: interval(np.array([row.get(name, np.nan) for row in rows], float), groups=groups)
        for name in names
    }


def _map(condition: str, image: np.ndarray) -> np.ndarray:
    return np.asarray(preprocess(condition, Image.fromarray(image)).convert("L"))
