"""Pictures under a limit of memory: what the README says of cards of 8, 12 and 24 GB is tried, not counted."""

from __future__ import annotations

from benchmarks.gpu.device import DEVICE, free_memory, limit_memory
from benchmarks.gpu.ours import Recorder, forward_flops, picture_row
from benchmarks.gpu.world import DTYPE, diffusers_parts
from runtime.loading.load import from_diffusers
from runtime.optimize.offload import Offload
from runtime.optimize.specialize import specialize
from runtime.pipeline import LocalControlPipeline
from runtime.sampling.denoiser import TorchDenoiser

RESERVE_GB = 1.0  # of a card, for its context and what else runs
CARDS = {8: "group", 12: "model", 24: None}  # GB as sold -> offload


def run(recorder: Recorder, small: bool) -> None:
    parts, adapter = diffusers_parts(small)
    for part in (parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2):
        part.to("cpu")
    model = from_diffusers(parts)
    specialize(model, DEVICE, DTYPE, "auto")
    model.vae.enable_tiling()
    adapters = {"canny": adapter}
    forward_flops(TorchDenoiser(model.unet.to(DEVICE)))  # counted once, where there is memory for it
    for gigabytes, how in sorted(CARDS.items(), reverse=True):
        free_memory()
        limit_memory(gigabytes - RESERVE_GB)
        if how is None:
            for part in (model.unet, model.vae, *model.text_encoders):
                part.to(DEVICE)
            pipe = LocalControlPipeline(model, adapters)
        else:
            for part in (model.unet, model.vae, *model.text_encoders):
                part.to("cpu")
            pipe = LocalControlPipeline(model, adapters, offload=Offload(model, DEVICE, how))
        case = f"picture, ours, {gigabytes} GB card, offload {how or 'none'}"
        recorder.measure(case, lambda pipe=pipe: picture_row(pipe, steps=4), 20)
    limit_memory(None)
