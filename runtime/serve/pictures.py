"""Results as bytes, made beside the engine: PNGs with what they say of their making, and what a client is told."""

from __future__ import annotations

import argparse
import base64
import io
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from PIL import Image

from runtime.cli.describe import describe, png_text
from runtime.control.png import png_bytes
from runtime.control.region import union
from runtime.control.sheet import changed_outside
from runtime.errors import InputError
from runtime.pipeline import LocalControlPipeline
from runtime.sampling.progress import Progress
from runtime.sampling.request import Request
from runtime.sampling.result import Result
from runtime.serve.refusals import Refusal
from runtime.serve.work import Drawn, Work

log = logging.getLogger("runtime.serve")


class Hearer(Protocol):
    """Who is told what becomes of works, on the engine's thread, an encoder's or a submitter's: it must be quick."""

    def started(self, work: Work) -> None: ...
    def stepped(self, work: Work, step: int, steps: int) -> None: ...
    def previewed(self, work: Work, step: int, steps: int, images: list[str]) -> None: ...
    def finished(self, work: Work, pictures: list[bytes], result: dict[str, Any]) -> None: ...
    def ended(self, work: Work, state: str, error: Refusal) -> None: ...
    def ticked(self, rows: int, seconds: float) -> None: ...


class Encoder:
    """An engine's watcher. It makes PNGs of what is drawn, on threads of its own, and tells one who hears of works."""

    def __init__(self, pipe: LocalControlPipeline, options: argparse.Namespace, hearer: Hearer):
        """options: of the command line, that say what was loaded."""
        self.pipe, self.options, self.hearer = pipe, options, hearer
        self.started, self.ended, self.ticked = hearer.started, hearer.ended, hearer.ticked
        self._pool = ThreadPoolExecutor(2, "pictures")

    def close(self) -> None:
        """Wait for what is being made."""
        self._pool.shutdown()

    def stepped(self, work: Work, progress: Progress) -> None:
        at = progress.step, progress.steps
        self.hearer.stepped(work, *at)
        if work.previews:
            try:
                small = progress.preview()
            except InputError:  # engines whose VAE no projection is known of
                work.previews = False
                return
            self._pool.submit(self._preview, work, at, small)

    def drawn(self, work: Work, drawn: Drawn) -> None:
        self._pool.submit(self._finish, work, drawn)

    def _preview(self, work: Work, at: tuple[int, int], small: list[Image.Image]) -> None:
        try:
            self.hearer.previewed(work, *at, [base64_of(jpeg(image)) for image in small])
        except Exception as error:
            log.error("request %s: its preview", work.id, exc_info=error)

    def _finish(self, work: Work, drawn: Drawn) -> None:
        try:
            start = time.perf_counter()
            pictures, result = encoded(self.pipe, self.options, work, drawn)
            result["timings"]["save"] = round(time.perf_counter() - start, 4)
        except Exception as error:
            log.error("request %s", work.id, exc_info=error)
            self.hearer.ended(
                work, "failed", Refusal(500, f"server: {type(error).__name__}; its log says more")
            )
            return
        self.hearer.finished(work, pictures, result)


def encoded(
    pipe: LocalControlPipeline, options: argparse.Namespace, work: Work, drawn: Drawn
) -> tuple[list[bytes], dict[str, Any]]:
    """Return the PNGs, with the text that the command line writes, and their seed, seconds, warnings and so on."""
    order, result = work.order, drawn.result
    options = argparse.Namespace(**{**vars(options), "preset": order.body.preset})
    settings = describe(pipe, result, order.request, order.regions, order.image, options)
    pictures = []
    for i, image in enumerate(result.images):
        text = png_text(settings | {"seed": result.seed + i}, order.body.metadata)
        pictures.append(png_bytes(image, text))
    width, height = result.images[0].size
    seconds = {"queued": drawn.queued, "running": drawn.running, **result.timings}
    about = {
        "id": work.id,
        "images": len(pictures),
        "seed": result.seed,
        "width": width,
        "height": height,
        "scheduler": settings["scheduler"],
        "timings": {stage: round(value, 4) for stage, value in seconds.items()},
        "region_steps": [list(steps) for steps in result.region_steps],
        "warnings": order.warnings,
    }
    if result.reference is not None:
        about["pixels_changed_outside"] = outside_changed(order.request, result)
    return pictures, about


def outside_changed(request: Request, result: Result) -> int:
    """Return how many pixels outside the masks differ from the reference's."""
    width, height = result.images[0].size
    outside = union(request.pack(height, width), height, width)[0, 0].numpy()
    pairs = zip(result.images, result.reference.images, strict=True)
    return int(sum(changed_outside(*pair, outside) for pair in pairs))


def jpeg(image: Image.Image, quality: int = 80) -> bytes:
    """Return a JPEG."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=quality)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()
