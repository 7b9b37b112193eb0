"""training.heeded: options that would change nothing, or spoil what is learned, are refused by name."""

import pytest

from runtime.errors import InputError
from training.config import PRESETS, TrainConfig, with_preset
from training.heeded import check_heeded


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise_weight": 0, "z0_loss": "off"}, "noise_weight 0 without a z0 loss"),
        ({"noise_weight": 0, "z0_weight": 0}, "noise_weight 0 without a z0 loss"),
        ({"mask_kind": "segmentation"}, "mask_kind segmentation without mask_from"),
        ({"condition": "color"}, "condition color: a new adapter of 1 channel sees its colours as grey"),
    ],
    ids=str,
)
def test_what_would_not_be_heeded_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        check_heeded(TrainConfig(**options))


@pytest.mark.parametrize("options", [{"adapter_blocks": 1}, {"condition_channels": 3}], ids=str)
def test_what_an_adapter_has_of_its_own_is_warned_of(options):
    with pytest.warns(UserWarning, match=r"\w+ \d beside adapter mine: not used, it has its own"):
        check_heeded(TrainConfig(adapter="mine", **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_from": "m", "mask_full": 0.5}, "mask_full 0.5: not used, masks are those of m"),
        (
            {"mask_from": "m", "mask_shapes": ("box",)},
            "mask_shapes box: not used, masks are those of m",
        ),
        (
            {"mask_from": "m", "mask_kind": "segmentation", "mask_soft": 0.5},
            "mask_soft 0.5: not used, masks are labels of m",
        ),
        ({"z0_from": 500}, "z0_from 500: not used, z0_schedule is constant, not step_range"),
        ({"z0_loss": "off", "z0_weight": 0.2}, "z0_weight 0.2: not used, z0_loss is off"),
        ({"preset": "global", "z0_loss": "off", "z0_schedule": "time"}, "z0_schedule time: not used"),
        ({"buckets": False, "max_aspect": 3.0}, "max_aspect 3.0: not used, all images are cut to one square"),
        ({"noise_weight": 0.0, "min_snr": 5.0}, "min_snr 5.0: not used, noise_weight is 0"),
        ({"z0_weight": 0.0, "z0_schedule": "time"}, "z0_schedule time: not used, z0_weight is 0"),
        ({"control": "controlnet", "adapter_blocks": 1}, "adapter_blocks 1: not used, a new ControlNet"),
    ],
    ids=str,
)
def test_what_others_put_out_of_use_is_warned_of(options, said):
    with pytest.warns(UserWarning, match=f"^{said}"):
        check_heeded(TrainConfig(**options))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_nothing_of_its_own(name):
    check_heeded(with_preset(name, {"mask_from": "masks", "z0_loss": "off"}))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "mask_from": "m",
            "mask_kind": "segmentation",
            "mask_full": 0.5,
            "mask_count": 1,
            "mask_min_area": 0.1,
        },
        {"z0_schedule": "step_range", "z0_from": 500},
        {"noise_weight": 0},
        {"min_snr": 5.0, "z0_schedule": "time"},
        {"z0_loss": "off"},
        {"mask_kind": "segmentation", "mask_from": "labels"},
        {"adapter": "mine", "condition": "color"},
        {"condition": "color", "condition_channels": 3},
        {"condition": "color", "control": "controlnet"},
        {"condition": "color", "condition_from": "conditions"},
    ],
    ids=str,
)
def test_what_is_heeded_is_not(options):
    check_heeded(TrainConfig(**options))
