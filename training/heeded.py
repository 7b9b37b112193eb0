"""Options that a run would not heed, or not as they are meant, refused or warned of before anything is loaded.

Not part of TrainConfig's own check: what an earlier run was told can still be read.
"""

from __future__ import annotations

import warnings

from runtime.control.conditions import COLOURED
from runtime.errors import InputError
from training.config import TrainConfig


def check_heeded(config: TrainConfig) -> None:
    """Raise InputError, naming the options, where one of them changes nothing beside the others, or spoils them; warn
    of what an adapter that is there has of its own.
    """
    if config.noise_weight == 0 and (config.z0_loss == "off" or config.z0_weight == 0):
        raise InputError(
            "noise_weight 0 without a z0 loss: nothing is left to learn; expected one of them above 0"
        )
    if config.mask_kind == "segmentation" and not config.mask_from:
        raise InputError(
            "mask_kind segmentation without mask_from: masks are random; expected the label images"
        )
    _check_start(config)


def _check_start(config: TrainConfig) -> None:
    """Check what is said of a new adapter."""
    if config.adapter != "new":
        for name in ("adapter_blocks", "condition_channels"):
            value, default = getattr(config, name), getattr(TrainConfig, name)
            if value != default:
                warnings.warn(
                    f"{name} {value} beside adapter {config.adapter}: not used, it has its own", stacklevel=4
                )
        return
    grey = config.condition_channels == 1 and config.control != "controlnet"  # which reads 3
    if grey and config.condition in COLOURED and not config.condition_from:
        raise InputError(
            f"condition {config.condition}: a new adapter of 1 channel sees its colours as grey; give "
            "--condition-channels 3"
        )
