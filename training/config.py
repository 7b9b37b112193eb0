"""What a training run is told: one dataclass, which is also its command line and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runtime.control.conditions import names as condition_names
from runtime.control.masks import RESIZES
from runtime.errors import InputError
from runtime.machine.files import read_json

MASK_SHAPES = ("box", "square", "circle", "strokes")
PAPER_BOX = 10_000 / 512**2  # the original's smallest box, as a share of the image


def option(default: Any, help: str, **more: Any) -> Any:
    """Return a field with what the command line says of it."""
    return field(default=default, metadata={"help": help, **more})


def typed(value: Any) -> Any:
    """Return a setting's value as its option takes it."""
    return ",".join(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run; JSON of it lies beside the weights it made.

    Those in LIVE may change when a run is resumed, the others may not.
    """

    data: str = option(
        "", "image folder, WebDataset tars (shards-{000..009}.tar), a .parquet file, or hf:PATH[@SPLIT]"
    )
    out: str = option("", "folder of the adapter, its checkpoints and logs")
    model: str = option("embedded", "the frozen SDXL model: embedded, folder, .safetensors file or hub id")
    vae: str | None = option(None, "another VAE, as for runtime.generate")
    prediction_type: str | None = option(
        None,
        "what the model predicts, where its files do not say it; by default as they say, or epsilon",
        choices=("epsilon", "v_prediction"),
    )
    adapter: str = option("new", "where to start: new (random weights), or an adapter's folder, file or id")
    preset: str = option("masked-sobel", "the method, and for 'paper' its whole recipe; other options win")

    caption_key: str = option("text", "column, or key of metadata.jsonl or a tar's .json, of the captions")
    image_key: str = option("image", "column of the images, or key of their names in metadata.jsonl")
    streaming: bool = option(False, "hf: read as a stream instead of downloading first")
    condition: str = option(
        "canny", "how conditions are computed from the images: canny, sobel, sketch, color, depth"
    )
    condition_from: str | None = option(None, "ready conditions: a folder, column, or extension in a tar")
    condition_channels: int = option(
        1, "channels that a new adapter reads; a new ControlNet reads 3", choices=(1, 3)
    )
    adapter_blocks: int = option(
        2, "residual blocks at each level of a new adapter; a new ControlNet has the UNet's"
    )
    mask_from: str | None = option(None, "masks instead of random ones: a folder, column, or extension")
    mask_kind: str = option(
        "mask", "what mask_from holds: masks, or label images", choices=("mask", "segmentation")
    )
    resolution: int = option(0, "side in pixels of a square image's bucket; 0: the model's own")
    buckets: bool = option(True, "keep aspect ratios: images of like shape share a batch")
    bucket_step: int = option(64, "a bucket's sides are multiples of this many pixels")
    max_aspect: float = option(2.0, "longest side over shortest of a bucket")
    crops: int = option(1, "crops kept of each image: the centre one, then random ones")
    flip: bool = option(False, "mirror every second crop")
    cache: str | None = option(None, "folder of cached latents, text and conditions; by default OUT/cache")
    cache_dtype: str = option("fp16", "of cached latents and text", choices=("fp32", "fp16", "bf16"))
    require_cache: bool = option(False, "stop where the cache lacks something instead of computing it")
    max_skipped: float = option(0.01, "stop where more than this share of the samples cannot be read")
    workers: int = option(2, "processes that read data")
    validation_samples: int = option(4, "samples kept out of training, drawn while it runs")

    control: str = option(
        "features",
        "what the mask gates: the adapter's features, a ControlNet's residuals, the condition, or nothing",
        choices=("features", "controlnet", "input", "everywhere"),
    )
    mask_resize: str = option("area", "how masks come to a level's size", choices=RESIZES)
    mask_shapes: tuple[str, ...] = option(MASK_SHAPES, "random masks are made of", choices=MASK_SHAPES)
    mask_count: int = option(2, "shapes of a random mask at most")
    mask_min_area: float = option(0.04, "a random mask's share of the image at least")
    mask_soft: float = option(0.1, "share of random masks with soft edges")
    mask_full: float = option(0.1, "share of masks that are the whole image")
    z0_loss: str = option(
        "sobel", "what of the predicted z0 is compared", choices=("off", "mse", "sobel", "laplacian")
    )
    z0_weight: float = option(0.1, "weight of that loss (lambda)")
    z0_schedule: str = option(
        "constant", "its weight over timesteps", choices=("constant", "step_range", "time")
    )
    z0_from: int = option(0, "step_range: first timestep with that loss")
    z0_to: int = option(999, "step_range: last timestep with it")
    noise_weight: float = option(1.0, "weight of the noise loss")
    min_snr: float = option(0.0, "gamma of min-SNR weighting of the noise loss; 0: off")
    timesteps: str = option("cubic", "how timesteps are drawn", choices=("cubic", "uniform"))
    prompt_drop: float = option(0.5, "share of samples whose prompt is dropped")

    steps: int = option(20_000, "optimizer steps")
    batch: int = option(4, "samples of a step, on each device")
    accumulate: int = option(1, "batches added up to a step")
    lr: float = option(1e-5, "learning rate")
    scale_lr: bool = option(False, "multiply it by the samples of a step over all devices")
    lr_schedule: str = option("constant", "after warm-up", choices=("constant", "cosine", "linear"))
    warmup: int = option(0, "steps over which the learning rate rises")
    optimizer: str = option(
        "adamw", "adamw8bit needs the package bitsandbytes", choices=("adamw", "adamw8bit")
    )
    beta1: float = option(0.9, "AdamW's")
    beta2: float = option(0.999, "AdamW's")
    weight_decay: float = option(0.01, "AdamW's")
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    ema: float = option(0.999, "decay of the averaged weights, which are what is saved; 0: none")

    dtype: str = option(
        "auto",
        "of the frozen model and the adapter's arithmetic; auto: bf16, or fp32 on a CPU that is slow in bf16",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = option(False, "torch.compile the UNet (a minute or more before the first step)")
    checkpointing: str = option(
        "auto", "recompute activations; auto: where memory runs out", choices=("auto", "on", "off")
    )
    backend: str = option("auto", "of the kernels", choices=("auto", "triton", "torch"))

    seed: int = option(0, "everything random follows from it")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(3, "checkpoints kept")
    validate_every: int = option(500, "steps between validation sheets; 0: none")
    validation_steps: int = option(30, "denoising steps of a validation image")
    tracker: str = option("tensorboard", "where losses go", choices=("tensorboard", "wandb", "none"))
    resume: str = option(
        "auto", "auto: go on from the last checkpoint in OUT; never; or a checkpoint's folder"
    )
    force_resume: bool = option(False, "resume although settings have changed")
    nan_limit: int = option(10, "stop after this many steps in a row without a finite loss")

    def __post_init__(self):
        check(self)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """Read a run's training.json. Raises InputError where it is not one."""
        try:
            values = read_json(path)["config"]
            values["mask_shapes"] = tuple(values["mask_shapes"])
            known = {f.name: f.default for f in fields(cls) if f.name in values}
            for name, default in known.items():
                if not _is_of_kind(values[name], default):
                    raise TypeError(f"{name} is {values[name]!r}, expected one such as {default!r}")
            return cls(**{name: values[name] for name in known})
        except (InputError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a run's configuration: {error}") from error

    def changed(self, other: TrainConfig) -> list[str]:
        """Return what differs in `other` of what must not change within a run, as "name here, was there".

        The number of steps may where the learning rate does not depend on it.
        """
        live = LIVE | ({"steps"} if self.lr_schedule == other.lr_schedule == "constant" else set())
        names = [f.name for f in fields(self) if f.name not in live]
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name} {ours!r}, was {theirs!r}" for name, ours, theirs in pairs if ours != theirs]


def _is_of_kind(value: object, default: object) -> bool:
    """Return whether a value may stand where the default stands: of its type, a whole number for another one."""
    if default is None:
        return value is None or isinstance(value, str)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


# What a resumed run may change: where things lie, how fast they go, what is reported. What they come to, the samples
# and how many are a step, is compared by itself.
LIVE = {
    "batch", "accumulate", "out", "data", "cache", "preset", "require_cache", "max_skipped", "workers", "streaming",
    "compile", "checkpointing", "backend", "save_every", "keep", "validate_every", "validation_steps", "tracker",
    "resume", "force_resume", "nan_limit",
}  # fmt: skip

METHODS: Mapping[str, dict[str, Any]] = {
    "global": {"control": "everywhere", "z0_loss": "off"},
    "masked-input": {"control": "input", "z0_loss": "off"},
    "masked-features": {"control": "features", "z0_loss": "off"},
    "masked-controlnet": {"control": "controlnet", "z0_loss": "off"},
    "masked-z0": {"control": "features", "z0_loss": "mse"},
    "masked-sobel": {"control": "features", "z0_loss": "sobel"},
    "masked-laplacian": {"control": "features", "z0_loss": "laplacian"},
}
PAPER = {  # arXiv 2602.01991, SD 1.4 at 512 x 512
    "mask_resize": "nearest", "mask_shapes": ("box",), "mask_count": 1, "mask_min_area": PAPER_BOX, "mask_soft": 0.0,
    "mask_full": 0.0, "z0_weight": 0.1, "z0_schedule": "constant", "timesteps": "cubic", "prompt_drop": 0.5,
    "steps": 50_000, "batch": 8, "accumulate": 2, "lr": 1e-5, "scale_lr": True, "lr_schedule": "constant", "warmup": 0,
    "clip": 1.0, "ema": 0.0, "condition_channels": 1, "buckets": False,
}  # fmt: skip
PRESETS: Mapping[str, dict[str, Any]] = {**METHODS, "paper": METHODS["masked-sobel"] | PAPER}


def with_preset(name: str, given: Mapping[str, Any]) -> TrainConfig:
    """Return the preset's options under those given by hand."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}")
    return replace(TrainConfig(**PRESETS[name], preset=name), **given)


def check(config: TrainConfig) -> None:
    """Raise InputError, naming the option, where one is out of its range."""
    for spec in fields(config):
        value, choices = getattr(config, spec.name), spec.metadata.get("choices")
        values = value if isinstance(value, tuple) else (value,)
        if choices and value is not None and not (values and set(values) <= set(choices)):
            raise InputError(f"{spec.name} {value!r}: expected {' or '.join(map(str, choices))}")
    shares = "mask_min_area", "mask_soft", "mask_full", "prompt_drop", "max_skipped"
    _expect(config, shares, lambda x: 0 <= x <= 1, "a share, 0 to 1")
    _expect(config, ("ema", "beta1", "beta2"), lambda x: 0 <= x < 1, "0 or more, less than 1")
    counts = (
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
    )
    _expect(config, counts, lambda x: x >= 1, "1 or more")
    positive = "workers", "warmup", "validate_every", "validation_samples", "resolution", "seed"
    weights = "z0_weight", "noise_weight", "min_snr", "weight_decay", "clip"
    _expect(config, (*positive, *weights), lambda x: 0 <= x < float("inf"), "0 or more")
    _expect(config, ("lr",), lambda x: 0 < x < float("inf"), "more than 0")
    _expect(config, ("max_aspect",), lambda x: x >= 1, "1 or more")
    _expect(config, ("bucket_step",), lambda x: x >= 16 and x % 16 == 0, "a multiple of 16")
    _expect(config, ("resolution",), lambda x: x % 16 == 0, "a multiple of 16")
    if config.condition not in condition_names():
        raise InputError(f"condition {config.condition!r}: expected one of {', '.join(condition_names())}")
    if config.flip and config.crops < 2:
        raise InputError("flip: mirrors every second crop; expected crops of 2 or more")
    if config.z0_from > config.z0_to:
        raise InputError(f"z0_from {config.z0_from} is after z0_to {config.z0_to}")


def _expect(config: TrainConfig, names, fits, expected: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not fits(value):
            raise InputError(f"{name} {value}: expected {expected}")
