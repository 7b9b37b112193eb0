"""The outside held: what no mask covers stays the reference picture, in the latents at every step, in the pixels at the
end."""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor

from runtime.control.images import pad
from runtime.control.masks import feather, mask_pyramid
from runtime.errors import InputError
from runtime.sampling.pixels import to_images

if TYPE_CHECKING:
    from runtime.loading.load import Model
    from runtime.sampling.request import Request

# Fields of a request that say nothing about the picture without control; a new field counts unless it is named here.
INSIDE = {
    "regions",
    "mask_resize",
    "output_type",
    "outside",
    "reference",
    "seed",
    "generator",
    "height",
    "width",
}


@dataclass(frozen=True, eq=False)
class Reference:
    """The pictures that the outside is held to, and how they came about.

    pixels: (B, 3, H, W) float32 in [0, 1]; None as long as nothing but latents was asked for. trajectory: the latents
    after each step, T of (B, C, h, w) float32. seed: of the first picture; generated: whether given generators drew the
    noise, which no seed gives again. settings: a digest of all else that they depend on. model: what drew them, a weak
    reference; None once the reference was in another process, where it fits none.
    """

    pixels: Tensor | None
    trajectory: Sequence[Tensor]
    seed: int
    generated: bool
    settings: str
    model: weakref.ref[Model] | None

    @property
    def images(self) -> list[Image.Image]:
        """Return the pictures; none as long as nothing but latents was asked for."""
        return [] if self.pixels is None else to_images(self.pixels)

    def fits(self, seed: int, settings: str, model: Model) -> bool:
        """Return whether a request without control would give these pictures."""
        own = self.model and self.model()
        return own is model and (self.seed, self.settings) == (seed, settings)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "model": None}


def check_reference(reference: Any, request: Request) -> None:
    """Raise InputError where what a request has for a reference is none, or of another seed than the one asked for."""
    if not isinstance(reference, Reference):
        raise InputError(
            f"reference: a {type(reference).__name__}; expected the `reference` of an earlier result"
        )
    if request.outside != "held":
        raise InputError(f"reference: given with outside {request.outside!r}; expected outside 'held'")
    if reference.generated and request.generators is None:
        raise InputError("reference: drawn with a generator; expected the same one, in the state it had")
    if request.seed not in (None, reference.seed):
        raise InputError(
            f"reference: of seed {reference.seed}, and the request has seed {request.seed}; expected the same"
        )


def settings(request: Request, scheduler: SchedulerMixin, *sizes: tuple[int, int]) -> str:
    """Return a digest of all that the pictures without control depend on, beside the model and the seed.

    sizes: of the run and of the pictures. The generators count as they are before the first number is drawn from them.
    """
    fields = {
        field.name: getattr(request, field.name)
        for field in dataclasses.fields(request)
        if field.name not in INSIDE
    }
    fields |= {"prompt": request.prompts, "negative_prompt": request.negatives, "sizes": sizes}
    fields |= {"scheduler": (type(scheduler).__name__, sorted(scheduler.config.items(), key=str))}
    fields |= {"generators": [generator.get_state() for generator in request.generators or ()]}
    return hashlib.sha256(repr({name: _shown(value) for name, value in fields.items()}).encode()).hexdigest()


def _shown(value):
    """Return what stands for a value: of numbers by the thousand, their digest."""
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    if isinstance(value, Tensor):
        numbers = value.cpu().contiguous().numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(numbers).hexdigest()
    return value


class Held:
    """Holds the latents of a run to the reference's where the union of the masks is 0.

    From the border on inwards, over the pixels of one latent, they turn from the reference's into the run's. Measured
    on the embedded model, this leaves no seam; without it, the decoder shows the border of the mask (benchmarks.quality
    .outside).
    """

    def __init__(self, inside: Tensor, size: tuple[int, int], reference: Reference):
        """inside: the union of the masks, (B or 1, 1, H, W). size: of the run in pixels, no smaller."""
        latents = reference.trajectory[0]
        cell = size[0] / latents.shape[-2]
        (weights,) = mask_pyramid(pad(feather(inside, cell), *size), [tuple(latents.shape[-2:])])
        self.weights, self.trajectory = weights.to(latents), reference.trajectory

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """Return the latents after a step (B, C, h, w), exactly the reference's where the mask is 0."""
        return torch.lerp(self.trajectory[step], latents, self.weights)


def image_trajectory(latents: Tensor, noise: Tensor, levels: Sequence[tuple[float, float]]) -> list[Tensor]:
    """Return the latents of a given picture after each step: z_ref = alpha z0 + sigma eps, with one eps.

    latents: z0, (B, C, h, w). levels: alpha and sigma before each step and after the last, see
    `schedulers.noise_levels`.
    """
    return [alpha * latents + sigma * noise for alpha, sigma in levels[1:]]


def compose(pixels: Tensor, reference: Tensor, inside: Tensor, cell: float) -> Tensor:
    """Return the picture (B, 3, H, W) inside the masks and the reference outside: bit for bit where they are 0.

    inside: the union of the masks, (B or 1, 1, H, W). cell: pixels of a latent's side; over half of it, from the border
    inwards, the reference turns into the picture, since a photograph is never quite what the VAE makes of it.
    """
    return torch.lerp(reference, pixels, feather(inside, cell / 2).to(pixels))
