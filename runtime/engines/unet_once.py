"""What a compiled UNet leaves to torch: the parameters that run once per image, as files of an engine folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.machine.files import read_json, write_json
from runtime.model.blocks import Resnet
from runtime.model.config import UNetConfig
from runtime.model.unet import UNet

CONFIG, WEIGHTS = "config.json", "once_per_image.safetensors"


def save_once_per_image(unet: UNet, folder: Path) -> None:
    """Write the UNet's config and those parameters, under diffusers' names, into a folder.

    Raises ValueError where its blocks were exchanged: what they take of the time may hold more than these parameters.
    """
    if any(type(resnet) is not Resnet for resnet in unet.resnets()):
        raise ValueError(
            "once_per_image: the UNet's residual blocks were exchanged; export a model as it was loaded"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(asdict(unet.config), folder / CONFIG)
    save_file({name: p.contiguous() for name, p in unet.once_per_image().items()}, folder / WEIGHTS)


def load_once_per_image(
    folder: Path, device: torch.device, dtype: torch.dtype, weights: Mapping[str, Tensor]
) -> UNet:
    """Return a UNet for `embed_time` and `project_text`; all its other parameters have no values, on the meta device.

    weights: others in place of those saved, by name; names of parameters that were not saved are left alone.
    """
    options = read_json(folder / CONFIG).items()
    config = UNetConfig(**{key: tuple(x) if isinstance(x, list) else x for key, x in options})
    with torch.device("meta"):
        unet = UNet(config).to(dtype).requires_grad_(False)
    state = load_file(folder / WEIGHTS, device=str(device))
    state |= {name: weights[name].to(device, dtype) for name in state if name in weights}
    unet.load_state_dict(state, strict=False, assign=True)
    return unet.eval()
