"""OpenAI's routes for pictures, on the same work: /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image, ImageChops
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from runtime.control.png import png_bytes
from runtime.errors import first_line
from runtime.machine.files import unique
from runtime.serve.events import Event
from runtime.serve.orders import of_validation
from runtime.serve.pictures import base64_of
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Drawing, Generate, ImagesGenerations, RegionBody
from runtime.serve.web.answers import (
    COMPONENTS,
    body_of,
    off_loop,
    ready,
    service_of,
    sse,
    stop,
    stream,
    submitted,
    takes,
    wait_for,
)
from runtime.serve.work import Work

OWN = "localcontrol"  # a name of the model, whichever it is
QUALITY = 90  # of jpeg and webp, where none is asked for
STRENGTH = 0.6  # of an edit without a mask, of which something should stay
# OpenAI's names of what ours calls otherwise
NAMES = {"images": "n", "width": "size", "height": "size"}
MANY = 60  # fields of a form
STREAMED = {200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "pictures"}}


def add_routes(app: FastAPI) -> None:
    """Add both to an application."""

    @app.post("/v1/images/generations", responses=STREAMED, openapi_extra=takes(ImagesGenerations))
    async def generations(request: Request) -> Response:
        """Draw, as OpenAI's API has it."""
        ready(request)
        asked = await body_of(request, ImagesGenerations)
        return await _answer(request, asked, partial(of_generation, asked), "image_generation")

    @app.post("/v1/images/edits", responses=STREAMED, openapi_extra={"requestBody": _form()})
    async def edits(request: Request) -> Response:
        """Draw inside a picture where the mask is transparent; every other pixel stays as it is."""
        ready(request)
        asked, files = await _read_form(request)
        opened = service_of(request).files.open
        return await _answer(request, asked, partial(of_edit, asked, files, opened), "image_edit")


async def _answer(request: Request, asked: ImagesGenerations, make, kind: str) -> Response:
    service = ready(request)
    if asked.model not in (None, OWN, service.served.name):
        message = f"model {asked.model!r}: this server has {service.served.name!r}; name it, or none"
        raise Refusal(404, message, "model")
    try:
        body = await off_loop(request, make)
        work = await submitted(request, body)
    except Refusal as error:
        if error.field in NAMES:
            raise Refusal(error.status, str(error), NAMES[error.field], error.retry_after) from None
        raise
    if asked.stream:
        show = partial(_event, request, asked, work, kind)
        return stream(work.events, show, left=partial(stop, service, work))
    await wait_for(request, service, work)
    pictures = await off_loop(request, _converted, asked, work.pictures)
    about = {"created": int(time.time()), "data": [{"b64_json": base64_of(data)} for data in pictures]}
    return JSONResponse({**about, **_described(asked, work.result), "localcontrol": work.result})


def of_generation(asked: ImagesGenerations) -> Generate:
    """Return what a request of OpenAI's asks for. Raises Refusal."""
    shared = {name: getattr(asked, name) for name in Drawing.model_fields}
    if asked.partial_images and not asked.stream:
        message = f"partial_images {asked.partial_images} without stream; expected stream: true"
        raise Refusal(422, message, "partial_images")
    images = 1 if asked.n is None else asked.n
    if images < 1:
        raise Refusal(422, f"n {images}: expected at least 1", "n")
    return Generate(
        prompt=asked.prompt, images=images, previews=bool(asked.partial_images), **shared, **_size(asked.size)
    )


def of_edit(
    asked: ImagesGenerations, files: Mapping[str, bytes], opened: Callable[[bytes, str], Image.Image]
) -> Generate:
    """Return what an edit asks for: the image, and inside its mask the prompt. Raises Refusal.

    opened: reads a picture, once its header has been found to be no larger than the server takes.
    """
    if "image" not in files:
        raise Refusal(422, "image: missing; expected a picture", "image")
    if asked.outside is not None:
        raise Refusal(422, f"outside {asked.outside!r}: it follows from the mask; leave it out", "outside")
    image, mask = opened(files["image"], "image"), None
    if "mask" in files:
        given = opened(files["mask"], "mask")
        if given.size != image.size:
            message = f"mask: {given.width} x {given.height} px; expected the image's {image.width} x {image.height}"
            raise Refusal(422, message, "mask")
        mask = _transparent(given)
        if mask is None:
            raise Refusal(422, "mask: no pixel is transparent; expected transparency where to draw", "mask")
    else:
        mask = _transparent(image)
    body = of_generation(asked)
    body.image = base64_of(files["image"])
    if mask is None:
        body.strength = STRENGTH if body.strength is None else body.strength
        return body
    region = RegionBody(prompt=asked.prompt, mask=base64_of(png_bytes(mask)))
    return body.model_copy(update={"outside": "held", "regions": [*body.regions, region]})


def _transparent(image: Image.Image) -> Image.Image | None:
    """Return a mask that is white where a picture is transparent; None where it is nowhere."""
    if not image.has_transparency_data:
        return None
    mask = ImageChops.invert(image.convert("RGBA").getchannel("A"))
    return mask if mask.getbbox() else None


def _size(text: str | None) -> dict[str, int]:
    if text in (None, "auto"):
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise Refusal(422, f"size {text[:40]!r}: expected width x height, such as 1024x1024, or auto", "size")
    return {"width": int(found[1]), "height": int(found[2])}


async def _read_form(request: Request) -> tuple[ImagesGenerations, dict[str, bytes]]:
    """Return an edit's fields and files. Raises Refusal."""
    fields, files = {}, {}
    form = await _parts(request)
    try:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if name in fields or name in files:
                raise Refusal(422, f"{name}: given twice; expected it once", name)
            if isinstance(value, UploadFile):
                if name not in ("image", "mask"):
                    raise Refusal(422, f"{name}: unknown file; expected image and mask", name)
                files[name] = await value.read()
            else:
                fields[name] = value
    finally:
        await form.close()
    if fields.get("input_fidelity") == "low":
        del fields["input_fidelity"]
    for name in fields.keys() & {"regions", "guidance_range"}:
        try:
            fields[name] = json.loads(fields[name], object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise Refusal(422, f"{name}: expected JSON: {first_line(error)}", name) from None
    try:
        return ImagesGenerations.model_validate(fields, strict=False), files
    except ValidationError as error:
        raise of_validation(error) from None


async def _parts(request: Request) -> FormData:
    """Return a form's parts. Raises Refusal where it is none, or its last part is not there."""
    kind = request.headers.get("content-type", "")
    about, options = parse_options_header(kind)
    if about.lower() != b"multipart/form-data":
        raise Refusal(415, f"Content-Type {kind[:60]!r}: expected multipart/form-data", "Content-Type")
    end, raw = options.get(b"boundary"), await request.body()
    # The parser drops a part that is cut off: without its mask an edit would draw the whole picture.
    if end and end + b"--" not in raw and not raw.rstrip().endswith(end):
        raise Refusal(400, "body: cut off within a part; expected its boundary at the end", "body")
    try:  # not by `request.form`, which takes a type with capitals for none where python-multipart is before 0.0.34
        return await MultiPartParser(request.headers, request.stream(), max_files=4, max_fields=MANY).parse()
    except MultiPartException as error:
        raise Refusal(400, f"body: {error.message}", "body") from None
    except UnicodeError:  # of the codec that the header names: Python has some that are none of text
        raise Refusal(415, f"Content-Type {kind[:60]!r}: expected text in UTF-8", "Content-Type") from None


def _form() -> dict[str, Any]:
    """Return the OpenAPI entry of the edits' body."""
    file = {"type": "string", "format": "binary"}
    made = ImagesGenerations.model_json_schema(ref_template=COMPONENTS)["properties"]
    fields = {"image": file, "mask": file, **made}
    del fields["outside"]  # it follows from the mask
    schema = {"type": "object", "required": ["image", "prompt"], "properties": fields}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _described(asked: ImagesGenerations, result: Mapping[str, Any]) -> dict[str, Any]:
    size = f"{result['width']}x{result['height']}"
    about = {"size": size, "quality": "auto", "background": "opaque"}
    return {**about, "output_format": asked.output_format or "png"}


def _converted(asked: ImagesGenerations, pictures: list[bytes]) -> list[bytes]:
    """Return PNGs in the format that was asked for."""
    if asked.output_format in (None, "png"):
        return pictures
    return [_encoded(Image.open(io.BytesIO(data)), asked) for data in pictures]


def _encoded(image: Image.Image, asked: ImagesGenerations) -> bytes:
    file, kind = io.BytesIO(), (asked.output_format or "png").upper()
    quality = QUALITY if asked.output_compression is None else asked.output_compression
    options = {} if kind == "PNG" else {"quality": quality}
    if profile := image.info.get("icc_profile"):  # which only a PNG is given by itself
        options["icc_profile"] = profile
    image.convert("RGB").save(file, format=kind, **options)
    return file.getvalue()


async def _event(
    request: Request, asked: ImagesGenerations, work: Work, kind: str, event: Event
) -> AsyncIterator[str]:
    """Yield what OpenAI's stream has for one of a work's events."""
    about = {"created_at": int(time.time())}
    if event.kind == "preview":
        wanted = partial_steps(asked.partial_images or 0, event.data["steps"])
        if event.data["step"] in wanted:
            size = tuple(
                reversed(work.order.request.picture_size(service_of(request).orders.capabilities.side))
            )
            data = await off_loop(request, _enlarged, event.data["images"][0], size, asked)
            index = wanted.index(event.data["step"])
            shown = _described(asked, dict(zip(("width", "height"), size, strict=True)))
            name = f"{kind}.partial_image"
            yield sse(name, {"type": name, "b64_json": data, "partial_image_index": index, **about, **shown})
    elif event.kind == "done":
        for data in await off_loop(request, _converted, asked, work.pictures):
            name, shown = f"{kind}.completed", _described(asked, work.result)
            answer = {
                "type": name,
                "b64_json": base64_of(data),
                **about,
                **shown,
                "localcontrol": work.result,
            }
            yield sse(name, answer)
    elif event.kind in ("failed", "cancelled", "interrupted"):
        yield sse("error", {"type": "error", **event.data})


def partial_steps(count: int, steps: int) -> list[int]:
    """Return after which of `steps` steps one of `count` previews is shown: evenly spread."""
    return sorted({max(1, round(steps * (i + 1) / (count + 1))) for i in range(count)})


def _enlarged(text: str, size: tuple[int, int], asked: ImagesGenerations) -> str:
    small = Image.open(io.BytesIO(base64.b64decode(text)))
    return base64_of(_encoded(small.resize(size, Image.Resampling.BICUBIC), asked))
