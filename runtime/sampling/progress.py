"""A run while it goes on: its state after a step, a preview of its picture, and a way to stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from runtime.errors import InputError
from runtime.loading.load import Model
from runtime.model.latent_rgb import FILE, LatentRGB, fit
from runtime.sampling.pixels import to_images


@dataclass
class Progress:
    """A run after a step, as `on_step` is shown it.

    step: steps done, of `steps`; those of a reference that is drawn first count too. latents: (B, C, h, w) float32,
    with which the run goes on; to be read only.
    """

    step: int
    steps: int
    latents: Tensor
    denoised: Callable[[], Tensor] = field(repr=False)
    projection: Callable[[], LatentRGB] = field(repr=False)
    cancelled: threading.Event = field(repr=False)

    def preview(self) -> list[Image.Image]:
        """Return a small picture of each image, RGB, of the latents' size: what the step takes the picture to be.

        It is the predicted picture without its noise, projected to colours, not decoded.
        """
        return to_images(self.projection().pixels(self.denoised()))

    def cancel(self) -> None:
        """Have the run stop before its next step, from any thread: the call raises `errors.Cancelled`."""
        self.cancelled.set()


OnStep = Callable[[Progress], object]
_fitting = threading.Lock()


def projection_of(model: Model) -> LatentRGB:
    """Return a model's projection, fitted at the first call for a VAE that is not known.

    Raises InputError where its VAE is on engines and not known.
    """
    with _fitting:
        if model.latent_rgb is None:
            if not isinstance(model.vae, AutoencoderKL):
                raise InputError(
                    f"preview: the engines have no {FILE}; rebuild them with export.build_engine"
                )
            model.latent_rgb = fit(model.vae)
        return model.latent_rgb
