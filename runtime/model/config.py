"""Of SDXL-like UNets: what of diffusers' configs may differ, and what must be as SDXL has it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel

from runtime.errors import InputError

# With a transformer and two resnets, and with one resnet alone
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
ORDERS = ("rgb", "bgr")
CONDITION_STRIDES = (1, 2, 4, 8)  # of a ControlNet's first layers, whose last stride is the VAE's
# Options of UNet2DConditionModel that SDXL leaves alone: the values this UNet implements.
FIXED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": ("text_time",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "global_pool_conditions": (False,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": MID_BLOCKS[:1],
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# Options without effect: diffusers' own scaled-dot-product attention ignores upcast_attention too.
IGNORED = ("sample_size", "upcast_attention", "addition_embed_type_num_heads")
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
WHOLE = (
    "in_channels",
    "out_channels",
    "norm_num_groups",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "conditioning_channels",
    "num_control_type",
    "num_trans_channel",
    "num_trans_head",
    "num_trans_layer",
)
# The least and the most of each level's
PER_LEVEL = {
    "block_out_channels": (1, 2**16),
    "layers_per_block": (1, 100),
    "transformer_layers_per_block": (0, 100),
    "attention_head_dim": (1, 2**16),
    "cross_attention_dim": (1, 2**16),
}


@dataclass(frozen=True)
class EncoderConfig:
    """The options of the half of an SDXL-like UNet that a ControlNet has too; tuples have one entry a level."""

    in_channels: int
    down_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    transformer_layers_per_block: tuple[int, ...]
    attention_head_dim: tuple[int, ...]  # the number of heads: a misnomer that diffusers kept for its configs
    cross_attention_dim: int
    use_linear_projection: bool
    norm_num_groups: int
    norm_eps: float
    addition_time_embed_dim: int
    projection_class_embeddings_input_dim: int
    flip_sin_to_cos: bool
    freq_shift: int

    @property
    def time_channels(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Return the channels of each skip tensor, in the order of the forward pass."""
        channels, last = self.block_out_channels, len(self.block_out_channels) - 1
        counts = [layers + (level < last) for level, layers in enumerate(self.layers_per_block)]
        return (channels[0], *(c for c, count in zip(channels, counts, strict=True) for _ in range(count)))

    @property
    def skip_levels(self) -> tuple[int, ...]:
        """Return how often the latents are halved at each skip tensor, in the order of the forward pass."""
        last = len(self.block_out_channels) - 1
        levels = [0]
        for level, layers in enumerate(self.layers_per_block):
            levels += [level] * layers + [level + 1] * (level < last)
        return tuple(levels)

    @property
    def skip_blocks(self) -> tuple[int, ...]:
        """Return the number of the down block that each skip tensor comes from; the first, conv_in's, counts as its."""
        last = len(self.block_out_channels) - 1
        counts = [layers + (level < last) for level, layers in enumerate(self.layers_per_block)]
        return (0, *(level for level, count in enumerate(counts) for _ in range(count)))


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """The options of UNet2DConditionModel in which SDXL-like models differ."""

    out_channels: int
    up_block_types: tuple[str, ...]

    @classmethod
    def from_diffusers(cls, config: Mapping) -> "UNetConfig":
        """Read a UNet2DConditionModel config; a missing key has diffusers' default.

        Raises InputError, naming key and value, where the config asks for what this UNet does not have.
        """
        return cls(**read_options(cls, UNet2DConditionModel, config, FIXED, "UNet"))

    @property
    def control_channels(self) -> tuple[int, ...]:
        """Return channels of the features that each level's control must have: the down blocks',
        then the mid block's.
        """
        return (*self.block_out_channels, self.block_out_channels[-1])


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """The options of ControlNetModel in which those for SDXL-like models differ, and those that a
    ControlNetUnionModel has beside them: kinds of control, and its transformer's over the conditions.
    """

    conditioning_channels: int
    conditioning_embedding_out_channels: tuple[int, ...]
    controlnet_conditioning_channel_order: str
    mid_block_type: str = MID_BLOCKS[0]
    num_control_type: int = 0  # of a ControlNet that is no union
    num_trans_channel: int = 0
    num_trans_head: int = 0
    num_trans_layer: int = 0

    @classmethod
    def from_diffusers(cls, config: Mapping, union: bool = False) -> "ControlNetConfig":
        """Read a config; a missing key has diffusers' default. union: whether it is a ControlNetUnionModel's.

        Raises InputError, naming key and value, where it asks for what this ControlNet does not have.
        """
        what, model = "ControlNet", ControlNetUnionModel if union else ControlNetModel
        fixed = {key: value for key, value in FIXED.items() if key not in cls.__dataclass_fields__}
        channels = _as_tuple(config.get("block_out_channels"), 1)
        values = read_options(cls, model, config, fixed | {"num_proj_channel": channels[:1]}, what)
        widths = _as_tuple(values["conditioning_embedding_out_channels"], 1)
        fits = len(widths) == len(CONDITION_STRIDES) and all(type(width) is int for width in widths)
        expected = f"{len(CONDITION_STRIDES)} whole numbers"
        _expect(what, "conditioning_embedding_out_channels", widths, fits, expected)
        for key, known in {
            "controlnet_conditioning_channel_order": ORDERS,
            "mid_block_type": MID_BLOCKS,
        }.items():
            if key in values:
                _expect(what, key, values[key], values[key] in known, " or ".join(known))
        heads, width = values.get("num_trans_head", 1), values.get("num_trans_channel", 0)
        _expect(what, "num_trans_head", heads, width % heads == 0, f"heads that divide {width} channels")
        return cls(**values | {"conditioning_embedding_out_channels": widths})


def read_options(cls: type, model: type, config: Mapping, fixed: Mapping[str, tuple], what: str) -> dict:
    """Return the fields of `cls` from a config of diffusers' `model`; a missing key has that one's default.

    fixed: options that must have one of these values. Raises InputError, naming `what`, key and value.
    """
    defaults = {name: p.default for name, p in inspect.signature(model).parameters.items()}
    options = defaults | {key: value for key, value in config.items() if not key.startswith("_")}
    values = {}
    for key, value in options.items():
        if key in cls.__dataclass_fields__ and key in defaults:
            values[key] = value
        elif key in fixed:
            _expect(what, key, value, value in fixed[key], " or ".join(map(repr, fixed[key])))
        elif key not in IGNORED:
            _expect(what, key, value, value is None or value is False, "no such option")
    return _per_level(values, what)


def _per_level(values: dict, what: str) -> dict:
    """Spell out what diffusers lets a config abbreviate; InputError where an entry cannot be an SDXL-like UNet's."""
    levels = len(_as_tuple(values["block_out_channels"], 1))
    for key, (least, most) in PER_LEVEL.items():
        spelled = _as_tuple(values[key], levels)
        fits = len(spelled) == levels and all(
            type(entry) is int and least <= entry <= most for entry in spelled
        )
        _expect(what, key, values[key], fits, f"{levels} whole numbers from {least} to {most}")
        values[key] = spelled
    for key in BLOCK_TYPES.keys() & values.keys():
        types = BLOCK_TYPES[key]
        fits = isinstance(values[key], (list, tuple)) and len(values[key]) == levels
        fits = fits and all(entry in types for entry in values[key])
        _expect(what, key, values[key], fits, f"{levels} of {' or '.join(types)}")
        values[key] = tuple(values[key])
    text = values["cross_attention_dim"]
    _expect(what, "cross_attention_dim", text, len(set(text)) == 1, "the same number at every level")
    values["cross_attention_dim"] = text[0]
    for key in (key for key in WHOLE if key in values):
        _expect(
            what, key, values[key], type(values[key]) is int and values[key] > 0, "a whole number above 0"
        )
    channels = values["block_out_channels"]
    attending = [kind.startswith("CrossAttn") for kind in values["down_block_types"][:-1]] + [True]
    heads = values["attention_head_dim"]
    fits = not any(c % n for c, n, has in zip(channels, heads, attending, strict=True) if has)
    _expect(what, "attention_head_dim", heads, fits, f"numbers of heads that divide {channels} channels")
    fits = not any(c % values["norm_num_groups"] for c in channels)
    _expect(what, "norm_num_groups", values["norm_num_groups"], fits, f"one that divides {channels} channels")
    eps = values["norm_eps"]
    _expect(what, "norm_eps", eps, type(eps) in (int, float) and 0 <= eps < 1, "a number from 0 to 1")
    for key in ("use_linear_projection", "flip_sin_to_cos"):
        _expect(what, key, values[key], type(values[key]) is bool, "true or false")
    shift = values["freq_shift"]
    _expect(what, "freq_shift", shift, type(shift) in (int, float) and abs(shift) < 1e6, "a number")
    return values


def _as_tuple(value: object, levels: int) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def _expect(what: str, key: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise InputError(
            f"{what} config: {key} = {value!r} is not supported, expected {expected} (an SDXL-like {what})"
        )
