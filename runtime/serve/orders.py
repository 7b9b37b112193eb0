"""Bodies of clients as requests to the pipeline: read, checked against what it can draw, refused by their fields."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from runtime.capabilities import Capabilities
from runtime.cli.presets import PRESETS
from runtime.control import conditions
from runtime.control.images import fit, load_image, load_pixels
from runtime.control.region import Region
from runtime.errors import InputError
from runtime.machine.files import unique
from runtime.sampling.request import Request
from runtime.sampling.schedulers import SCHEDULERS
from runtime.serve.files import NAME, Files, check_size, from_base64
from runtime.serve.limits import MIB, Limits
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Condition, Generate

STEPS = Request.__dataclass_fields__["steps"].default
MEMBERS = ("float", "str", "constrained")  # of unions, as pydantic calls them
ALIASES = ("none", "colour", "lineart")  # of preprocessors
# Of `Request` by their own names; the others are made of several, or are the server's.
COPIED = (
    "negative_prompt", "steps", "guidance", "guidance_range", "guidance_rescale", "scheduler", "seed", "cache_interval",
    "clip_skip", "prompt_syntax", "mask_resize", "strength", "outside", "height", "width",
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """A request, and what was said on the way to it.

    regions, image: as they were given, pictures by the hashes of their bytes. warnings: one line each; those of its
    drawing come to them. bytes: of its decoded pictures.
    """

    body: Generate
    request: Request
    regions: list[dict[str, Any]]
    image: str | None
    warnings: list[str]
    bytes: int

    @contextmanager
    def warned(self) -> Iterator[None]:
        """Have warnings of this context be of this request: it is drawn on a thread that all share."""
        with collected() as said:
            try:
                yield
            finally:
                self.warnings.extend(line for line in dict.fromkeys(said) if line not in self.warnings)


class Pictures:
    """The pictures of one request, each decoded once, and not more than the server has memory for."""

    def __init__(self, files: Files, limits: Limits):
        self.files, self.limits, self.bytes = files, limits, 0
        self._opened: dict[str, Image.Image] = {}

    def read(self, text: str, field: str) -> tuple[str, Image.Image]:
        """Return a picture, and the hash of its bytes. Raises Refusal, naming the field."""
        name, data = self.files.read(text, field)
        if name not in self._opened:
            self._opened[name] = self.files.open(data, field)
            self.take(self._opened[name].width * self._opened[name].height * 4)
        return name, self._opened[name]

    def take(self, size: int) -> None:
        """Count bytes. Raises Refusal where they are too many."""
        self.bytes += size
        if self.bytes > self.limits.queue_mib * MIB:
            message = f"regions: their pictures take more than {self.limits.queue_mib} MiB; expected fewer or smaller"
            raise Refusal(422, message, "regions")


def parse(model: type[BaseModel], raw: bytes) -> BaseModel:
    """Return a body. Raises Refusal: 400 where it is not JSON, 422, naming the field, where it does not fit."""
    try:
        body = model.model_validate_json(raw)
        json.loads(raw, object_pairs_hook=unique)  # pydantic keeps the last of two fields of one name
        return body
    except ValidationError as error:
        raise of_validation(error) from None
    except ValueError as error:
        raise Refusal(422, f"body: {error}") from None


def of_validation(error: ValidationError) -> Refusal:
    """Return pydantic's first complaint as a refusal."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # of a union's members each complains: that of the one which was meant says more than another's type
    first = next((each for each in found if not each["type"].endswith("_type")), found[0])
    if first["type"] == "json_invalid":
        return Refusal(400, f"body: {first['msg']}")
    parts = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    field = ".".join(str(part) for part in parts if part not in MEMBERS)
    known = "expected one that /openapi.json lists" if first["type"] == "extra_forbidden" else first["msg"]
    what = "unknown field; " if first["type"] == "extra_forbidden" else ""
    return Refusal(422, f"{field or 'body'}: {what}{known}", field or None)


class Orders:
    """Makes orders for one pipeline, wherever that is loaded."""

    def __init__(
        self, capabilities: Capabilities, files: Files, limits: Limits, most_rows: float = float("inf")
    ):
        """capabilities: of that pipeline. most_rows: of one request, as rows of the model's own size."""
        self.capabilities, self.files, self.limits, self.most_rows = capabilities, files, limits, most_rows
        self.preprocessors = preprocessors()

    def kept(self, body: Generate) -> Generate:
        """Return a body whose pictures are files, by their ids: what is stored of a job. Raises Refusal."""
        body = body.model_copy(deep=True)
        for field, owner, name in self._named(body):
            if (text := getattr(owner, name)) is not None and not NAME.fullmatch(text):
                setattr(owner, name, self.files.add(from_base64(text, field), field)[0])
        return body

    @staticmethod
    def _named(body: Generate) -> Iterator[tuple[str, BaseModel, str]]:
        """Yield every picture's place in a body: what it is called, and whose field of which name it is."""
        yield "image", body, "image"
        for i, region in enumerate(body.regions):
            for name in ("condition", "mask"):
                yield f"regions.{i}.{name}", region, name

    def order(self, body: Generate) -> Order:
        """Return a body's order. Raises Refusal."""
        with collected() as said:
            try:
                pictures = Pictures(self.files, self.limits)
                self._check_counts(body)
                regions, described = self._regions(body, pictures)
                name, image = None, None
                if body.image is not None:
                    name, image = pictures.read(body.image, "image")
                request = Request(
                    body.prompt, regions, image=image, images_per_prompt=body.images, **self._settings(body)
                )
                self._check(request)
                height, width = request.picture_size(self.capabilities.side)
                pictures.take(len(regions) * height * width * 16)  # four channels in float32
                request.pack(height, width)
            except InputError as error:
                raise Refusal.of(error) from error
        body = body.model_copy(update={"image": None, "regions": []})  # its base64 is not needed any more
        return Order(body, request, described, name, list(dict.fromkeys(said)), pictures.bytes)

    def condition(self, body: Condition) -> Image.Image:
        """Return a picture's condition, as a run would compute it. Raises Refusal."""
        try:
            if body.preprocess not in self.preprocessors:
                raise InputError(f"preprocess {body.preprocess!r}: expected {', '.join(self.preprocessors)}")
            _, image = Pictures(self.files, self.limits).read(body.image, "image")
            width, height = body.width or image.width, body.height or image.height
            for field, side in (("width", width), ("height", height)):
                if side < 1:
                    raise Refusal(422, f"{field} {side}: expected pixels", field)
            field = "width" if width >= height else "height"
            check_size(width, height, field, self.limits)
            if width * height > self.limits.condition_megapixels * 1e6:
                most = f"{self.limits.condition_megapixels:g} million pixels"
                raise Refusal(422, f"{field}: {width} x {height} px; expected at most {most}", field)
            fitted: Tensor = fit(load_pixels(image, "image"), height, width, "image")
            return conditions.preprocess(body.preprocess, load_image(fitted))
        except InputError as error:
            raise Refusal.of(error) from error

    def _check_counts(self, body: Generate) -> None:
        """Refuse what is longer than the server takes, before a picture is decoded."""
        limits, texts = self.limits, {"prompt": body.prompt, "negative_prompt": body.negative_prompt}
        texts |= {f"regions.{i}.prompt": region.prompt for i, region in enumerate(body.regions)}
        for field, text in texts.items():
            if text is not None and len(text) > limits.characters:
                message = f"{field}: {len(text):,} characters; expected at most {limits.characters:,}"
                raise Refusal(422, message, field)
        if body.images < 1:
            raise Refusal(422, f"images {body.images}: expected at least 1", "images")
        for field, count in (("regions", len(body.regions)), ("images", body.images)):
            if count > getattr(limits, field):
                raise Refusal(422, f"{field} {count}: expected at most {getattr(limits, field)}", field)
        for field in ("height", "width"):
            if (getattr(body, field) or 0) > limits.side:
                message = f"{field} {getattr(body, field)}: expected at most {limits.side} pixels"
                raise Refusal(422, message, field)

    def _settings(self, body: Generate) -> dict[str, Any]:
        """Return the request's settings: what was given, else the preset's, else the request's own defaults."""
        given = {name: getattr(body, name) for name in COPIED if getattr(body, name) is not None}
        given.setdefault("steps", STEPS)
        if body.preset is not None:
            if body.preset not in PRESETS:
                raise InputError(f"preset {body.preset!r}: expected {', '.join(PRESETS)}")
            given |= {k: v for k, v in PRESETS[body.preset].items() if getattr(body, k) is None}
        if given["steps"] > self.limits.steps:
            message = f"steps {given['steps']}: expected at most {self.limits.steps}"
            raise Refusal(422, message, "preset" if body.preset and body.steps is None else "steps")
        if given.get("scheduler", "euler") not in SCHEDULERS:
            raise InputError(f"scheduler {given['scheduler']!r}: expected {', '.join(SCHEDULERS)}")
        return given

    def _regions(self, body: Generate, pictures: Pictures) -> tuple[list[Region], list[dict[str, Any]]]:
        """Return the regions, and what is said of them."""
        regions, described = [], []
        for i, given in enumerate(body.regions):
            fields = given.model_dump(exclude_none=True)
            shown = dict(fields)
            for key in fields.keys() & {"condition", "mask"}:
                shown[key], fields[key] = pictures.read(fields[key], f"regions.{i}.{key}")
            if "condition" in fields and "adapter" not in fields:
                fields["adapter"] = shown["adapter"] = self.default_adapter
            regions.append(Region.from_dict(fields, f"regions.{i}"))
            described.append(shown)
        return regions, described

    @property
    def default_adapter(self) -> str:
        """Return the adapter of a condition that names none: canny, or the first there is."""
        names = list(self.capabilities.adapters)
        return "canny" if "canny" in names or not names else names[0]

    def _check(self, request: Request) -> None:
        """Refuse what this pipeline cannot draw, or this server not."""
        self.capabilities.check(request)
        height, width = request.picture_size(self.capabilities.side)
        field = "width" if width >= height else "height"
        check_size(width, height, field, self.limits)
        rows = weight(request, self.capabilities.side)
        if rows > self.most_rows:
            message = (
                f"{field}: {request.images} of {width} x {height} px are {rows / self.most_rows:.1f} times what one "
                "request may be; expected fewer or smaller pictures"
            )
            raise Refusal(422, message, field)


def weight(request: Request, side: int) -> float:
    """Return a request's rows, as rows of the model's own size. side: of that, pixels."""
    height, width = request.size(side)
    return request.most_rows * max(1.0, height * width / side**2)


def preprocessors() -> list[str]:
    """Return those that run here: depth needs a model."""
    found = [name for name in conditions.names() if name not in ALIASES]
    try:
        conditions.check_preprocess("depth")
    except InputError:
        found.remove("depth")
    return found


_said: ContextVar[list[str] | None] = ContextVar("said", default=None)


@contextmanager
def collected() -> Iterator[list[str]]:
    """Yield a list that gets the warnings of this context, where `heard` is at work."""
    said: list[str] = []
    token = _said.set(said)
    try:
        yield said
    finally:
        _said.reset(token)


@contextmanager
def heard() -> Iterator[None]:
    """Have warnings go to the request they are about, and others where they went; once in a process, around all."""

    def hear(message, category, *rest, **more) -> None:
        said = _said.get()
        if said is None:
            before(message, category, *rest, **more)
        else:
            said.append(" ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        before, warnings.showwarning = warnings.showwarning, hear
        yield
