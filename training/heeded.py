"""Options that a run would not heed, or not as they are meant, refused or warned of before anything is loaded.

Not part of TrainConfig's own check: what an earlier run was told can still be read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from runtime.control.conditions import COLOURED
from runtime.errors import InputError
from training.config import PRESETS, TrainConfig, typed


def check_heeded(config: TrainConfig) -> None:
    """Raise InputError, naming the options, where they leave nothing to learn, or spoil it; warn of those that others
    put out of use, and of what an adapter that is there has of its own.
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
    for names, why in _idle(config):
        for name in names:
            value, usual = getattr(config, name), getattr(TrainConfig, name)
            if value != PRESETS.get(config.preset, {}).get(name, usual):
                warnings.warn(f"{name} {typed(value)}: not used, {why}", stacklevel=3)


def _idle(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield options that others put out of use, and why."""
    if config.z0_loss == "off":
        yield ("z0_weight", "z0_schedule", "z0_from", "z0_to"), "z0_loss is off"
    elif config.z0_weight == 0:
        yield ("z0_loss", "z0_schedule", "z0_from", "z0_to"), "z0_weight is 0"
    elif config.z0_schedule != "step_range":
        yield ("z0_from", "z0_to"), f"z0_schedule is {config.z0_schedule}, not step_range"
    if config.noise_weight == 0:
        yield ("min_snr",), "noise_weight is 0"
    if config.mask_from and config.mask_kind == "mask":
        drawn = "mask_shapes", "mask_count", "mask_min_area", "mask_soft", "mask_full"
        yield drawn, f"masks are those of {config.mask_from}"
    elif config.mask_from:
        yield ("mask_shapes", "mask_soft"), f"masks are labels of {config.mask_from}"
    if not config.buckets:
        yield ("bucket_step", "max_aspect"), "all images are cut to one square"
    if config.adapter == "new" and config.control == "controlnet":
        yield ("adapter_blocks",), "a new ControlNet has the UNet's"


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
    # a ControlNet reads 3
    if config.control != "controlnet" and _loses_colours(config, config.condition_channels):
        raise InputError(
            f"condition {config.condition}: a new adapter of 1 channel sees its colours as grey; give "
            "--condition-channels 3"
        )


def warn_of_grey(config: TrainConfig, channels: int) -> None:
    """Warn where the adapter that a run starts from, of so many channels, sees the condition's colours as grey."""
    if _loses_colours(config, channels):
        warnings.warn(
            f"condition {config.condition}: adapter {config.adapter} of 1 channel sees its colours as grey",
            stacklevel=2,
        )


def _loses_colours(config: TrainConfig, channels: int) -> bool:
    return channels == 1 and config.condition in COLOURED and not config.condition_from
