"""training.config: the same options as Python, as JSON and on the command line; each is checked by name."""

import dataclasses
import json

import pytest

from runtime.errors import InputError
from training.config import LIVE, PRESETS, TrainConfig, with_preset
from training.loop.checkpoint import describe
from training.train_adapter import make_parser

NAMES = [field.name for field in dataclasses.fields(TrainConfig)]
DEFAULT = TrainConfig()

# A value other than the default for each option, and how it is written on the command line.
OTHERS = {
    "data": ("photos", "photos"),
    "out": ("made", "made"),
    "model": ("sdxl", "sdxl"),
    "vae": ("vae", "vae"),
    "prediction_type": ("v_prediction", "v_prediction"),
    "adapter": ("canny", "canny"),
    "preset": ("paper", "paper"),
    "caption_key": ("caption", "caption"),
    "image_key": ("jpg", "jpg"),
    "condition": ("sketch", "sketch"),
    "condition_from": ("edges", "edges"),
    "condition_channels": (3, "3"),
    "adapter_blocks": (1, "1"),
    "mask_from": ("masks", "masks"),
    "mask_kind": ("segmentation", "segmentation"),
    "resolution": (512, "512"),
    "bucket_step": (32, "32"),
    "max_aspect": (1.5, "1.5"),
    "crops": (2, "2"),
    "cache": ("kept", "kept"),
    "cache_dtype": ("bf16", "bf16"),
    "max_skipped": (0.5, "0.5"),
    "workers": (0, "0"),
    "validation_samples": (1, "1"),
    "control": ("input", "input"),
    "mask_resize": ("nearest", "nearest"),
    "mask_shapes": (("box", "strokes"), "box,strokes"),
    "mask_count": (3, "3"),
    "mask_min_area": (0.1, "0.1"),
    "mask_soft": (0.2, "0.2"),
    "mask_full": (0.3, "0.3"),
    "z0_loss": ("laplacian", "laplacian"),
    "z0_weight": (0.2, "0.2"),
    "z0_schedule": ("time", "time"),
    "z0_from": (10, "10"),
    "z0_to": (500, "500"),
    "noise_weight": (0.5, "0.5"),
    "min_snr": (5.0, "5"),
    "timesteps": ("uniform", "uniform"),
    "prompt_drop": (0.1, "0.1"),
    "steps": (7, "7"),
    "batch": (2, "2"),
    "accumulate": (3, "3"),
    "lr": (1e-3, "1e-3"),
    "lr_schedule": ("cosine", "cosine"),
    "warmup": (5, "5"),
    "optimizer": ("adamw8bit", "adamw8bit"),
    "beta1": (0.8, "0.8"),
    "beta2": (0.99, "0.99"),
    "weight_decay": (0.1, "0.1"),
    "clip": (0.0, "0"),
    "ema": (0.99, "0.99"),
    "dtype": ("fp32", "fp32"),
    "checkpointing": ("on", "on"),
    "backend": ("torch", "torch"),
    "seed": (3, "3"),
    "save_every": (10, "10"),
    "keep": (1, "1"),
    "validate_every": (0, "0"),
    "validation_steps": (4, "4"),
    "tracker": ("none", "none"),
    "resume": ("never", "never"),
    "nan_limit": (2, "2"),
}
SWITCHES = ["streaming", "buckets", "flip", "require_cache", "scale_lr", "compile", "force_resume"]
CHANGED = {name: value for name, (value, _) in OTHERS.items()} | {
    name: not getattr(DEFAULT, name) for name in SWITCHES
}


def flag(name, no=""):
    return f"--{no}{name.replace('_', '-')}"


def parsed(*arguments):
    return vars(make_parser().parse_args(list(arguments)))


def read_back(config, folder):
    path = folder / "training.json"
    path.write_text(describe(config, step=3, batch_of_all=8), "utf-8")
    return TrainConfig.read(path)


def test_the_table_above_has_another_value_for_every_option():
    assert sorted(CHANGED) == sorted(NAMES)
    assert all(value != getattr(DEFAULT, name) for name, value in CHANGED.items())


@pytest.mark.parametrize("name", OTHERS)
def test_every_option_has_its_flag(name):
    value, text = OTHERS[name]
    assert parsed(flag(name), text) == {name: value}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_can_be_set_both_ways(name):
    assert parsed(flag(name)) == {name: True}
    assert parsed(flag(name, no="no-")) == {name: False}


def test_what_is_not_given_is_left_to_the_preset():
    assert parsed() == {}


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "many"], ["--control", "nowhere"], ["--condition-channels", "2"], ["--step", "3"]],
)
def test_a_wrong_argument_is_named_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(*arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ") and arguments[0] in said and said.count("\n") == 1


def test_the_help_tells_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert [name for name in NAMES if flag(name) not in said] == []
    assert "(default: 20000)" in said and "(default: none)" in said
    assert "(default: box,square,circle,strokes)" in said
    assert [name for name in PRESETS if f" {name}: " not in said] == []


@pytest.mark.parametrize(
    "config", [DEFAULT, TrainConfig(**CHANGED), *(with_preset(name, {}) for name in PRESETS)]
)
def test_a_configuration_survives_its_json(config, tmp_path):
    assert read_back(config, tmp_path) == config


def test_options_of_a_later_version_are_passed_over(tmp_path):
    path = tmp_path / "training.json"
    about = json.loads(describe(DEFAULT, step=0))
    about["config"]["invented_later"] = 1
    path.write_text(json.dumps(about), "utf-8")
    assert TrainConfig.read(path) == DEFAULT


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"config": 1}', '{"config": {}}', '{"config": {"mask_shapes": 1}}', "\0"]
)
def test_what_is_no_configuration_is_an_input_error(text, tmp_path):
    path = tmp_path / "training.json"
    if text is not None:
        path.write_text(text, "utf-8")
    with pytest.raises(InputError, match="training.json: not a run's configuration"):
        TrainConfig.read(path)


def test_a_configuration_with_an_option_out_of_range_is_not_read(tmp_path):
    text = describe(DEFAULT, step=0).replace('"steps": 20000', '"steps": 0')
    (tmp_path / "training.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match="steps 0"):
        TrainConfig.read(tmp_path / "training.json")


@pytest.mark.parametrize("name", sorted(set(NAMES) - LIVE - {"steps"}))
def test_what_must_not_change_within_a_run_is_said_with_both_values(name):
    flip = {"crops": 2} if name == "flip" else {}
    was, now = TrainConfig(**flip), TrainConfig(**{name: CHANGED[name]}, **flip)
    assert now.changed(was) == [f"{name} {CHANGED[name]!r}, was {getattr(was, name)!r}"]


def test_what_may_change_is_not_said():
    assert TrainConfig(**{name: CHANGED[name] for name in LIVE}).changed(DEFAULT) == []


@pytest.mark.parametrize(
    ("schedule", "said"),
    [("constant", []), ("cosine", ["steps 9, was 5"]), ("linear", ["steps 9, was 5"])],
)
def test_steps_may_change_where_the_learning_rate_does_not_follow_them(schedule, said):
    was, now = TrainConfig(lr_schedule=schedule, steps=5), TrainConfig(lr_schedule=schedule, steps=9)
    assert now.changed(was) == said


SHARES = ["mask_min_area", "mask_soft", "mask_full", "prompt_drop", "max_skipped"]
COUNTS = [
    "steps",
    "batch",
    "accumulate",
    "adapter_blocks",
    "crops",
    "mask_count",
    "save_every",
    "keep",
    "nan_limit",
    "validation_steps",
]
NOT_NEGATIVE = ["workers", "warmup", "validate_every", "validation_samples", "resolution", "seed"]
WEIGHTS = ["z0_weight", "noise_weight", "min_snr", "weight_decay", "clip"]
NAN, INFINITE = float("nan"), float("inf")
OUT_OF_RANGE = [
    *[(name, value, "a share, 0 to 1") for name in SHARES for value in (-0.01, 1.01, NAN)],
    *[
        (name, value, "0 or more, less than 1")
        for name in ("ema", "beta1", "beta2")
        for value in (-0.1, 1.0, NAN)
    ],
    *[(name, value, "1 or more") for name in COUNTS for value in (0, -1)],
    *[(name, -16, "0 or more") for name in NOT_NEGATIVE],
    *[(name, value, "0 or more") for name in WEIGHTS for value in (-0.1, NAN, INFINITE)],
    *[("lr", value, "more than 0") for value in (0.0, -1e-5, NAN, INFINITE)],
    *[("max_aspect", value, "1 or more") for value in (0.9, NAN)],
    *[("bucket_step", value, "a multiple of 16") for value in (0, 8, 40, -16)],
    ("resolution", 500, "a multiple of 16"),
]


@pytest.mark.parametrize(("name", "value", "expected"), OUT_OF_RANGE)
def test_an_option_out_of_its_range_is_named(name, value, expected):
    with pytest.raises(InputError) as caught:
        TrainConfig(**{name: value})
    assert str(caught.value) == f"{name} {value}: expected {expected}"


WITH_CHOICES = [field.name for field in dataclasses.fields(TrainConfig) if "choices" in field.metadata]


@pytest.mark.parametrize("name", WITH_CHOICES)
@pytest.mark.parametrize("value", ["other", ("box", "other"), ()])
def test_an_option_that_is_none_of_its_choices_is_named_with_them(name, value):
    with pytest.raises(InputError) as caught:
        TrainConfig(**{name: value})
    choices = TrainConfig.__dataclass_fields__[name].metadata["choices"]
    assert str(caught.value) == f"{name} {value!r}: expected {' or '.join(map(str, choices))}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"condition": "fog"}, "condition 'fog': expected one of canny, color"),
        ({"flip": True}, "flip: mirrors every second crop; expected crops of 2 or more"),
        ({"z0_from": 600, "z0_to": 500}, "z0_from 600 is after z0_to 500"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, expected):
    with pytest.raises(InputError) as caught:
        TrainConfig(**options)
    assert str(caught.value).startswith(expected)


def test_the_presets_are_the_methods_and_the_paper():
    wanted = [
        "global",
        "masked-input",
        "masked-features",
        "masked-controlnet",
        "masked-z0",
        "masked-sobel",
        "masked-laplacian",
        "paper",
    ]
    assert list(PRESETS) == wanted
    assert with_preset("masked-sobel", {}) == DEFAULT


@pytest.mark.parametrize(
    ("name", "control", "z0_loss"),
    [
        ("global", "everywhere", "off"),
        ("masked-input", "input", "off"),
        ("masked-features", "features", "off"),
        ("masked-z0", "features", "mse"),
        ("masked-sobel", "features", "sobel"),
        ("masked-laplacian", "features", "laplacian"),
    ],
)
def test_a_method_sets_what_the_mask_gates_and_the_loss_and_nothing_else(name, control, z0_loss):
    made = with_preset(name, {})
    assert made == dataclasses.replace(DEFAULT, preset=name, control=control, z0_loss=z0_loss)


def test_the_paper_is_its_whole_recipe():
    """arXiv 2602.01991: SD 1.4 at 512 x 512, boxes of at least 10,000 pixels there, 8 samples twice a step."""
    paper = with_preset("paper", {})
    assert (paper.control, paper.z0_loss, paper.z0_weight, paper.z0_schedule) == (
        "features",
        "sobel",
        0.1,
        "constant",
    )
    assert (paper.mask_shapes, paper.mask_count, paper.mask_full, paper.mask_soft) == (("box",), 1, 0.0, 0.0)
    assert paper.mask_min_area * 512**2 == 10_000 and paper.mask_resize == "nearest"
    assert (paper.batch, paper.accumulate, paper.steps, paper.lr) == (8, 2, 50_000, 1e-5)
    assert (paper.scale_lr, paper.clip, paper.prompt_drop, paper.timesteps) == (True, 1.0, 0.5, "cubic")
    assert (paper.optimizer, paper.ema, paper.condition_channels, paper.buckets) == ("adamw", 0.0, 1, False)


def test_options_given_by_hand_win_over_the_preset():
    assert with_preset("paper", {"batch": 2, "z0_loss": "mse"}).batch == 2
    assert with_preset("paper", {"z0_loss": "mse"}).z0_loss == "mse"


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(
        InputError, match="preset 'best' is unknown; expected one of global, masked-input, .*paper"
    ):
        with_preset("best", {})
