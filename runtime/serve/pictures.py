"""Results as bytes: PNGs with what they say of their making, and what a client is told of them."""

from __future__ import annotations

import argparse
import base64
import io
from typing import Any

from PIL import Image

from runtime.cli.describe import describe, png_text
from runtime.control.images import png_bytes
from runtime.control.region import union
from runtime.control.sheet import changed_outside
from runtime.pipeline import LocalControlPipeline
from runtime.sampling.drawing import Result
from runtime.sampling.request import Request
from runtime.serve.work import Drawn, Work


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
