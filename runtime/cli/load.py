"""From options to a pipeline that is ready to draw."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from runtime.cli.command import heartbeat, say
from runtime.cli.sources import adapter_sources, lora_sources

if TYPE_CHECKING:
    from runtime import LocalControlPipeline
    from runtime.sampling.request import Request


def load(options: argparse.Namespace, request: Request | None = None) -> LocalControlPipeline:
    """Return the pipeline that the options ask for, compiled where they say so, and print how long it took.

    request: the one to be compiled for; by default one of the model's own size.
    """
    start = time.perf_counter()
    pipe = _load(options)
    if options.compile or options.cuda_graph:
        pipe.compile(compiler="inductor" if options.compile else None, cuda_graph=options.cuda_graph)
        with heartbeat("compiling: minutes the first time, later from the cache on disk"):
            pipe.warm_up(request=request)
    say(f"model    {time.perf_counter() - start:6.2f} s")
    return pipe


def _load(options: argparse.Namespace) -> LocalControlPipeline:
    """Return the pipeline, in torch or on engines."""
    from runtime import LocalControlPipeline

    common = {
        "device": options.device,
        "backend": options.backend,
        "allow_pickle": options.allow_pickle,
        "loras": lora_sources(options.lora),
        "tokenizer": options.tokenizer,
        "config": options.config,
    }
    adapters = adapter_sources(options.adapter)
    if options.engine:
        return LocalControlPipeline.from_engine(options.engine, adapters, model=options.model, **common)
    return LocalControlPipeline.from_pretrained(
        options.model or "embedded",
        adapters,
        dtype=options.dtype,
        vae=options.vae,
        prediction_type=options.prediction_type,
        attention=options.attention or "auto",
        quantize=options.quantize,
        offload=options.offload,
        vae_tiling=options.vae_tiling,
        **common,
    )
