"""Conditions: what a control shows to an adapter, computed from a photograph or a drawing.

Follows T2I-Adapter's conventions: edges and lines are white on black, near is white in a depth map, and the
colour grid is a mosaic. Compute a condition at the size of the picture to be made: lines are one to a few
pixels wide, and shrinking them later fades them.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from runtime.control.images import load_image
from runtime.errors import InputError, first_line
from runtime.machine.files import sha256

COLOURED = ("color", "colour", "none")  # those that can have colours; all others are grey
DEPTH_MODEL_VARIABLE = "LOCALCONTROL_DEPTH_MODEL"

_REGISTRY: dict[str, Callable[..., Image.Image]] = {}


def register(*names: str):
    """Decorator: make `function(image, **options)` available under `names` (a name and its aliases).

    The function gets an upright PIL image of mode "L" or "RGB" and returns one of the same size.
    """

    def add(function):
        _REGISTRY.update(dict.fromkeys(names, function))
        return function

    return add


def names() -> list[str]:
    """Return every registered name, aliases included."""
    return sorted(_REGISTRY)


def check_preprocess(name: str) -> None:
    """Raise InputError where a condition cannot be computed here: depth, without its model. It is loaded, and kept."""
    check_preprocess_name(name)
    if name == "depth":
        _load_depth_model(_depth_folder(None))


def check_preprocess_name(name: str) -> None:
    """Raise InputError unless `name` is registered."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise InputError(f"preprocess {name!r} is unknown; expected one of {', '.join(names())}")


def preprocess(name: str, image, **options) -> Image.Image:
    """Return the condition `name` of `image` (anything `images.load_image` takes): "L" or "RGB", of the same size.

    Raises:
        InputError: an unknown name, an unreadable image, a missing package or model.
    """
    check_preprocess_name(name)
    return _REGISTRY[name](load_image(image, f"{name} input"), **options)


@register("none")
def none(image: Image.Image) -> Image.Image:
    """Return the image, which is a condition already."""
    return image


@register("canny")
def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Canny edges, about one pixel wide; of a colour image each pixel's strongest channel counts."""
    return Image.fromarray(cv2.Canny(np.array(image), low, high))


@register("sobel")
def sobel(image: Image.Image) -> Image.Image:
    """Magnitude of the Sobel gradient, strongest channel; a step from black to white gives white."""
    pixels = np.array(image, np.float32)
    gx = cv2.Sobel(pixels, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 4, borderType=cv2.BORDER_REPLICATE)
    gy = cv2.Sobel(pixels, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 4, borderType=cv2.BORDER_REPLICATE)
    return _from_channels(np.hypot(gx, gy))


@register("sketch", "lineart")
def sketch(image: Image.Image, detail: float = 1.0) -> Image.Image:
    """White lines where the image is darker than its surroundings: pen on paper, the dark side of an edge.

    A difference of Gaussians relative to the local brightness ("dodge"), so that shadows and lit parts give
    equal lines, then a soft threshold. `detail` > 1 gives finer lines. A drawing in white on black is a
    condition already ("none").
    """
    pixels = np.array(image, np.float32) / 255
    wide = max(1.0, max(image.size) / 110 / detail)
    surroundings = cv2.GaussianBlur(pixels, (0, 0), wide)
    local = cv2.GaussianBlur(pixels, (0, 0), wide / 8)
    darker = 1 - (local + 0.05) / (surroundings + 0.05)  # the offset damps noise in the blacks
    return _from_channels(np.clip((darker - 0.1) / 0.2, 0, 1) * 255)


@register("color", "colour")
def color(image: Image.Image) -> Image.Image:
    """T2I-Adapter's colour grid of mean colours: cells of 64 px, or of an eighth of a shorter side below 512."""
    cell = max(1, min(64, min(image.size) // 8))
    grid = [max(1, round(side / cell)) for side in image.size]
    mosaic = image.convert("RGB").resize(grid, Image.Resampling.BOX)
    return mosaic.resize(image.size, Image.Resampling.NEAREST)


@register("depth")
def depth(image: Image.Image, model: str | os.PathLike | None = None) -> Image.Image:
    """Relative depth by a model in a local folder: `model`, or the environment's LOCALCONTROL_DEPTH_MODEL.

    Any safetensors model that transformers' AutoModelForDepthEstimation reads; one that predicts inverse depth
    (Depth Anything, MiDaS/DPT) gives near = white, which is what depth adapters expect.
    """
    processor, network = _load_depth_model(_depth_folder(model))
    with torch.inference_mode():
        outputs = network(**processor(images=image.convert("RGB"), return_tensors="pt"))
    sizes = [(image.height, image.width)]
    values = processor.post_process_depth_estimation(outputs, sizes)[0]["predicted_depth"].float().numpy()
    span = max(float(np.ptp(values)), np.finfo(np.float32).tiny)
    return _from_channels((values - values.min()) / span * 255)


def _depth_folder(model: str | os.PathLike | None) -> str:
    """Return the depth model's folder. Raises InputError where none is named or there."""
    folder = model or os.environ.get(DEPTH_MODEL_VARIABLE)
    if not folder:
        raise InputError(
            "depth: no depth model; install the package transformers, download a model such as "
            f"depth-anything/Depth-Anything-V2-Small-hf and set {DEPTH_MODEL_VARIABLE} to its folder"
        )
    try:
        folder = Path(folder).expanduser()
    except RuntimeError as error:  # an unknown ~user
        raise InputError(
            f"depth: {folder}: {error}; expected the folder of a depth-estimation model"
        ) from error
    if not folder.is_dir():
        raise InputError(f"depth: {folder} is not a folder; expected that of a depth-estimation model")
    return str(folder)


def depth_model_digest() -> str | None:
    """Return a hash of the model that depth is computed by here; None where none is named, or it is not there."""
    try:
        folder = Path(_depth_folder(None))
        files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
        facts = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    except (InputError, OSError):
        return None
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=1)
def _load_depth_model(folder: str):
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    except ImportError as error:
        raise InputError("depth: needs the package transformers; pip install transformers") from error
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoImageProcessor.from_pretrained(folder, **options)
        network = AutoModelForDepthEstimation.from_pretrained(folder, use_safetensors=True, **options)
    except ImportError as error:  # transformers before 5.20 asks for torchvision
        raise InputError(
            f"depth: transformers needs another package: {first_line(error)}; install it, or a newer transformers"
        ) from error
    except Exception as error:  # OSError, ValueError, KeyError ...: whatever the folder lacks
        raise InputError(f"depth: {folder} holds no depth-estimation model: {error}") from error
    return processor, network.eval()


def _from_channels(values: np.ndarray) -> Image.Image:
    """Grey picture of (H, W) or (H, W, C) values in 0..255: the largest over the channels."""
    values = values if values.ndim == 2 else values.max(axis=2)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
