"""One request on its way to pictures: text, control, denoising, decoding."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor

from runtime.control.features import Control, acting_steps
from runtime.control.images import fit, pad
from runtime.control.region import PackedRegion, pad_regions, union
from runtime.control.residuals import Residuals
from runtime.control.rows import over_rows, per_picture, spread
from runtime.control.words import Words
from runtime.machine.finite import check_finite
from runtime.machine.report import timed
from runtime.model.attention import use_attention
from runtime.sampling import held
from runtime.sampling.loop import AfterStep, Run, make_noise
from runtime.sampling.pixels import decode, encode
from runtime.sampling.progress import OnStep, Progress, projection_of
from runtime.sampling.request import MAX_SEED, Request
from runtime.sampling.result import OUTPUT, Result
from runtime.sampling.schedulers import make_scheduler, noise_levels, rehearse, set_timesteps
from runtime.text.encode import Reading, encode_guidance, encode_words

if TYPE_CHECKING:
    from runtime.pipeline import LocalControlPipeline

T = TypeVar("T")
Runs = Generator[Run, None, T]  # yields runs, each of which is done when the next is asked for; returns a T
TextRows = tuple[Tensor, Tensor]  # states (G, S, D) and pooled embeddings (G, P)


class Drawing:
    """Draws one request on a pipeline, once."""

    def __init__(self, pipe: LocalControlPipeline, request: Request, on_step: OnStep | None = None):
        """on_step: called after every step; those of a reference that has to be drawn count too."""
        self.pipe, self.model, self.request, self.on_step = pipe, pipe.model, request, on_step
        self.device, self.dtype = pipe.device, pipe.dtype
        self.size, self.picture_size = (
            request.size(pipe.default_size),
            request.picture_size(pipe.default_size),
        )
        self.reading = Reading(request.prompt_syntax, request.clip_skip, pipe.denoiser.most_tokens)
        self.timings: dict[str, float] = {}
        self.seed, self.generators = _randomness(request)
        scheduler, timesteps = self._schedule()
        rehearse(scheduler)
        self.steps = len(timesteps)
        self.held = request.outside == "held"
        self.packed = request.pack(*self.picture_size)
        self.settings, self.reference, self.inside = "", None, None
        if self.held:
            self.inside = union(self.packed, *self.picture_size, request.images)
            self.settings = held.settings(request, scheduler, self.size, self.picture_size)
            given = request.reference
            fits = given is not None and given.fits(self.seed, self.settings, self.model)
            self.reference = given if fits else None
        self.all_held = self.held and not self.inside.any()  # the pictures are the reference's
        runs = (request.draws_reference and self.reference is None) + (not self.all_held)
        self.steps_done, self.all_steps = 0, runs * self.steps
        self.cancelled, self.result = threading.Event(), None

    def draw(self) -> Result:
        """Return the pictures. Raises InputError where a stage's result is not finite, naming the stage."""
        for run in self.runs():
            with self.pipe.at_work("denoise"), use_attention(self.pipe.attention):
                run.finish()
        return self.result

    def runs(self) -> Iterator[Run]:
        """Yield each run that the pictures need, to be done before the next is asked for; at the end `result` is there.

        Raises InputError: see `draw`.
        """
        with timed(self.timings, "total", self.device):
            start = self._encode_image()
            noise = self._make_noise()
            text, states = self._encode_text()
            if self.held:
                self.reference = yield from self._find_reference(text, noise, start)
            if self.all_held:
                latents = self.reference.trajectory[-1].clone()
            else:
                latents = yield from self._draw_regions(text, states, noise, start)
            images = [] if self.request.output_type == "latent" else self._make_images(latents)
        steps = acting_steps(self.packed, self.steps)
        self.result = Result(images, latents, self.timings, self.seed, steps, self.reference)

    def _draw_regions(
        self, text: TextRows, states: Sequence[Tensor], noise: Tensor, start: Tensor | None
    ) -> Runs[Tensor]:
        """Return the latents of the run with control and words. states: of the words."""
        request, packed = self.request, pad_regions(self.packed, *self.size)
        control, residuals = self._make_control(packed)
        words = Words.build(packed, states, self.steps, request.rows(False), request.mask_resize)
        hold = held.Held(self.inside, self.size, self.reference) if self.held else None
        with timed(self.timings, "denoise", self.device):
            return (yield from self._denoise(text, noise, start, control, words, hold, residuals))

    def _make_images(self, latents: Tensor) -> list[Image.Image] | np.ndarray | Tensor:
        with timed(self.timings, "decode", self.device):
            if self.all_held:
                pixels = self.reference.pixels.clone()
            elif self.held:
                factor = self.pipe.vae_factor
                pixels = held.compose(self._decode(latents), self.reference.pixels, self.inside, factor)
            else:
                pixels = self._decode(latents)
            images = OUTPUT[self.request.output_type](pixels)
        profiles = self.request.profiles if self.request.output_type == "pil" else []
        for image, profile in zip(images, spread(profiles, len(images)), strict=True) if profiles else ():
            if profile:
                image.info["icc_profile"] = profile  # which a PNG is saved with
        return images

    def _schedule(self) -> tuple[SchedulerMixin, Tensor]:
        """Return a fresh scheduler, which remembers its run, and the timesteps of this one."""
        scheduler = make_scheduler(self.request.scheduler, self.model.scheduler)
        return scheduler, set_timesteps(scheduler, self.request.steps, self.device, self.request.left)

    def _encode_image(self) -> Tensor | None:
        """Return the latents of the picture that the run starts from, (B, C, h, w); None without one."""
        request = self.request
        if request.image is None:
            return None
        pixels = pad(self._given_pixels(), *self.size)
        with timed(self.timings, "encode", self.device), self.pipe.at_work("decode"):
            return encode(self.model.vae, pixels, self.generators, request.images)

    def _given_pixels(self) -> Tensor:
        """Return the pictures that were given, (N, 3, H, W)."""
        pixels = fit(self.request.image, *self.picture_size, "image")
        return pixels.expand(-1, 3, -1, -1).to(self.device)  # of one channel where it is grey

    def _make_noise(self) -> Tensor:
        sides = (side // self.pipe.vae_factor for side in self.size)
        shape = (self.request.images, self.pipe.denoiser.latent_channels, *sides)
        return make_noise(shape, self.generators, self.request.latents).to(self.device)

    def _encode_text(self) -> tuple[TextRows, list[Tensor]]:
        """Return the prompts' conditioning, and the states of each region's words, (S, D)."""
        request = self.request
        with timed(self.timings, "text", self.device), self.pipe.at_work("text"):
            text, pooled = encode_guidance(
                self.model,
                request.composition.texts,
                request.negatives,
                request.guidance > 1,
                self.reading,
                request.composition.prompts,
            )
            words = encode_words(self.model, request.regions, self.reading, text.shape[1])
            for states in (text, *words):
                check_finite(states, "text", self.dtype)
        return (text, pooled), words

    def _make_control(self, packed: Sequence[PackedRegion]) -> tuple[Control | None, Residuals | None]:
        """Return what T2I-Adapters and ControlNets make of the regions' conditions."""
        nets, mode, rows = self.pipe.controlnets, self.request.mask_resize, self.request.rows(False)
        shown = [item for item in packed if item.condition is not None]
        through_nets = [item for item in shown if item.region.adapter in nets]
        through_adapters = [item for item in shown if item.region.adapter not in nets]
        with timed(self.timings, "adapter", self.device):
            control = Control.build(
                through_adapters,
                self.pipe.adapters,
                self.steps,
                device=self.device,
                dtype=self.dtype,
                channels=self.pipe.denoiser.control_channels,
                mode=mode,
                images=rows,
            )
            with self.pipe.at_work("denoise") if through_nets else nullcontext():
                residuals = Residuals.build(
                    through_nets, nets, self.steps, device=self.device, mode=mode, images=rows
                )
            made = [f for level in (control.features if control else ()) for f in level]
            for feature in (*made, *(run.condition for run in (residuals.runs if residuals else ()))):
                check_finite(feature, "adapter", self.dtype)
        return control, residuals

    def _find_reference(self, text: TextRows, noise: Tensor, start: Tensor | None) -> Runs[held.Reference]:
        """Return the reference that was handed in, where it fits; otherwise the given picture's, or one drawn now."""
        request, found = self.request, self.reference
        if found is not None and (found.pixels is not None or request.output_type == "latent"):
            return found
        with timed(self.timings, "reference", self.device):
            if request.image is not None:
                trajectory = held.image_trajectory(start, noise, noise_levels(*self._schedule()))
                pixels = over_rows(per_picture(self._given_pixels(), request.images), request.images)
            else:
                trajectory = (
                    (yield from self._draw_reference(text, noise)) if found is None else found.trajectory
                )
                pixels = None if request.output_type == "latent" else self._decode(trajectory[-1])
            generated, model = request.generators is not None, weakref.ref(self.model)
            return held.Reference(pixels, trajectory, self.seed, generated, self.settings, model)

    def _draw_reference(self, text: TextRows, noise: Tensor) -> Runs[list[Tensor]]:
        """Return the latents after each step of the run without control; the next run draws the same numbers."""
        states = [generator.get_state() for generator in self.generators]
        trajectory: list[Tensor] = []

        def keep(latents: Tensor, step: int) -> Tensor:
            trajectory.append(latents)
            return latents

        yield from self._denoise(text, noise, None, None, None, keep)
        for generator, state in zip(self.generators, () if self.all_held else states, strict=False):
            generator.set_state(state)
        return trajectory

    def _denoise(
        self,
        text: TextRows,
        noise: Tensor,
        start: Tensor | None,
        control: Control | None,
        words: Words | None,
        after_step: AfterStep | None,
        residuals: Residuals | None = None,
    ) -> Runs[Tensor]:
        request, (states, pooled) = self.request, text
        scheduler, timesteps = self._schedule()
        ids = torch.tensor([[*self.size, 0, 0, *self.size]], device=self.device)
        ids = ids.expand(len(states), -1).to(self.dtype)
        with self.pipe.at_work("denoise"):
            step = self.pipe.denoiser.prepare(
                timesteps,
                states,
                pooled,
                ids,
                control,
                request.images_per_prompt,
                request.cache_interval,
                words,
                residuals,
            )
        run = Run(
            step,
            scheduler,
            noise,
            request.guidance,
            self.generators,
            self._note if self.on_step else None,
            request.guidance_range,
            request.guidance_rescale,
            timesteps,
            start,
            after_step,
            self.cancelled,
            None if request.composition.plain else request.composition,
        )
        yield run
        check_finite(run.latents, "denoise", self.dtype)
        return run.latents

    def _note(self, latents: Tensor, denoised: Callable[[], Tensor]) -> None:
        """Show the caller a step."""
        self.steps_done += 1
        where = partial(projection_of, self.model)
        self.on_step(Progress(self.steps_done, self.all_steps, latents, denoised, where, self.cancelled))

    def _decode(self, latents: Tensor) -> Tensor:
        """Return (B, 3, H, W) float32 in [0, 1], at the picture's own size."""
        with self.pipe.at_work("decode"):
            rows, columns = self.picture_size
            return decode(self.model.vae, latents)[..., :rows, :columns]


def _randomness(request: Request) -> tuple[int, Sequence[torch.Generator]]:
    """Return the first image's seed, and the generators: one for each image, or the one that was given for all."""
    if request.generators is not None:
        return request.generators[0].initial_seed(), request.generators
    seed = request.seed
    if seed is None:
        seed = secrets.randbits(32) if request.reference is None else request.reference.seed
    return seed, [torch.Generator().manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(request.images)]
