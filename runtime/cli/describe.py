"""What is said of a picture's making, in its PNG and in the report."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import kernels
from runtime.machine.arithmetic import name_of

if TYPE_CHECKING:
    from runtime import LocalControlPipeline, Result
    from runtime.sampling.request import Request


def describe(
    pipe: LocalControlPipeline,
    result: Result,
    request: Request,
    regions: Sequence[Mapping[str, Any]],
    image: str | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return all that it takes to repeat a run, defaults filled in.

    regions: their fields as they were given, with the names of their pictures. image: the name of the one to start
    from. options: those of the command line that say what was loaded, and the preset.
    """
    width, height = result.images[0].size
    if request.outside == "held" and image:  # its own size, which may be no multiple of 16
        width, height = request.width, request.height
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "prompt_syntax": request.prompt_syntax,
        "clip_skip": request.clip_skip,
        "regions": list(regions),
        "image": image,
        "strength": request.strength,
        "outside": request.outside,
        "seed": result.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "guidance_range": list(request.guidance_range),
        "guidance_rescale": request.guidance_rescale,
        "cache_interval": request.cache_interval,
        "mask_resize": request.mask_resize,
        "preset": options.preset,
        "scheduler": request.scheduler or type(pipe.model.scheduler).__name__,
        "height": height,
        "width": width,
        "model": pipe.model.name,
        "engine": options.engine,
        "adapters": options.adapter,
        "vae": options.vae,
        "prediction_type": options.prediction_type or pipe.model.scheduler.config.prediction_type,
        "loras": options.lora,
        "tokenizer": options.tokenizer,
        "config": options.config,
        "dtype": name_of(pipe.dtype),
        "device": str(pipe.device),
        "backend": pipe.backend,
        "attention": pipe.attention,
        "compile": options.compile,
        "cuda_graph": options.cuda_graph,
        "quantize": options.quantize,
        "offload": options.offload,
        "vae_tiling": options.vae_tiling,
        "software": f"localcontrol {kernels.__version__}",
    }


def png_text(settings: dict, metadata: str) -> dict[str, str]:
    """Return what a PNG says of its making; metadata: one of --metadata's choices."""
    if metadata == "none":
        return {}
    shown = settings if metadata == "full" else {k: _plain(k, v) for k, v in settings.items()}
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in shown.items()}


def _plain(key: str, value):
    """Return a setting without absolute paths and the user's name, which tell of a person and a machine."""
    if key in ("prompt", "negative_prompt") or not value:
        return value
    if isinstance(value, dict):
        return {name: _plain(name, own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(key, own) for own in value]
    if not isinstance(value, str):
        return value
    if key == "adapters" and "=" in value:
        name, _, path = value.partition("=")
        return f"{name}={_plain('', path)}"
    parts = [part for part in re.split(r"[/\\]", value) if part]
    personal = (
        os.path.isabs(value) or value[0] == "~" or re.match(r"[A-Za-z]:[/\\]", value) or _user() in parts
    )
    return parts[-1] if personal and parts else value


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's process may be nobody
        return ""
