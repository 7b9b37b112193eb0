"""What clients send: `runtime.sampling.request.Request` and `Region` in JSON, and what only a server knows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Picture = Annotated[
    str,
    Field(description="the id of a file (POST /v1/files), a data URL of a picture, or its bytes in base64"),
]
Name = Annotated[str, Field(max_length=200)]
Amount = Annotated[
    float
    | Annotated[str, Field(max_length=2000)]
    | Annotated[dict[Name, float], Field(max_length=100)]
    | Annotated[list[tuple[float, float]], Field(max_length=100)],
    Field(
        description="a number, or keyframes over the steps: '0:1.0,0.5:0.3', {'0': 1.0, '0.5': 0.3}, or pairs"
    ),
]


class Body(BaseModel):
    """A JSON object of known fields, each of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class RegionBody(Body):
    """A control, words, or both, inside one mask; fields as of `runtime.Region`."""

    condition: Picture | None = Field(None, description="what the control shows")
    mask: Picture | None = Field(None, description="where it acts, white; everywhere without one")
    adapter: Name | None = Field(None, description="the adapter that reads the condition")
    preprocess: Name | None = Field(
        None, description="the condition to compute of the picture: canny, sketch ..."
    )
    scale: Amount | None = None
    start: float | None = Field(None, description="the share of the steps after which it begins to act")
    end: Amount | None = Field(None, description="the share of the steps after which it stops, or a fade")
    levels: list[float] | None = Field(None, max_length=16, description="four factors, from fine to coarse")
    mask_condition: bool | None = None
    prompt: str | None = Field(None, description="words that take the prompt's place inside the mask")
    prompt_weight: Amount | None = None
    uncond_scale: float | None = None


class Drawing(Body):
    """What any route that draws takes."""

    negative_prompt: str | None = None
    regions: list[RegionBody] = []
    steps: int | None = None
    guidance: float | None = None
    guidance_range: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    scheduler: Name | None = Field(None, description="one of /v1/capabilities' schedulers")
    preset: Name | None = Field(None, description="scheduler, steps and guidance that go together")
    seed: int | None = Field(None, description="of the first picture, the next has seed + 1")
    cache_interval: int | None = None
    clip_skip: int | None = None
    prompt_syntax: Literal["plain", "a1111"] | None = None
    mask_resize: Literal["area", "nearest"] | None = None
    strength: float | None = Field(None, description="the share of the steps that are run on the image")
    outside: Literal["free", "held"] | None = None
    deterministic: bool = Field(
        False, description="share no step with other requests: the same bits every time"
    )


class Generate(Drawing):
    """A request for pictures."""

    prompt: str
    images: int = Field(1, description="how many pictures")
    height: int | None = None
    width: int | None = None
    image: Picture | None = Field(None, description="start from this picture")
    metadata: Literal["plain", "none"] = Field("plain", description="the settings that a PNG's text has")
    previews: bool = Field(False, description="with each step's event a small picture, JPEG in base64")
    session: str | None = Field(
        None, max_length=200, description="a newer request of the same session takes this one's place"
    )


class GenerateNow(Generate):
    """A request whose answer is the picture, or the events on the way to it."""

    stream: bool = Field(False, description="answer with server-sent events: queued, step, preview, done")


class Condition(Body):
    """A picture, and what to make of it for an adapter."""

    image: Picture
    preprocess: Name = Field(description="canny, sobel, sketch, color, depth")
    height: int | None = Field(None, description="of the picture to be made, by default the image's own")
    width: int | None = None


class ImagesGenerations(Drawing):
    """OpenAI's request for pictures, and with it what `Generate` has."""

    prompt: str
    model: Name | None = None
    n: int | None = None
    size: str | None = Field(None, description="1024x1024 ..., or auto: the model's own")
    response_format: Literal["b64_json"] | None = Field(None, description="pictures come in the answer")
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="of jpeg and webp, their quality")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = Field(None, description="nothing is moderated")
    user: str | None = Field(None, max_length=200)
