"""training.heeded: options that would change nothing, or spoil what is learned, are refused by name."""

import pytest

from runtime.errors import InputError
from training.config import TrainConfig
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
    "options",
    [
        {},
        {"noise_weight": 0},
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
