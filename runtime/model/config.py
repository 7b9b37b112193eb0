"""Of SDXL-like UNets: what of diffusers' UNet2DConditionModel config may differ, and what must be as SDXL has it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from runtime.errors import InputError

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
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
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
)
PER_LEVEL = ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "attention_head_dim")


@dataclass(frozen=True)
class UNetConfig:
    """The options of UNet2DConditionModel in which SDXL-like models differ; tuples have one entry a level."""

    in_channels: int
    out_channels: int
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
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

    @classmethod
    def from_diffusers(cls, config: Mapping) -> "UNetConfig":
        """Read a UNet2DConditionModel config; a missing key has diffusers' default.

        Raises InputError, naming key and value, where the config asks for what this UNet does not have.
        """
        defaults = {name: p.default for name, p in inspect.signature(UNet2DConditionModel).parameters.items()}
        options = defaults | {key: value for key, value in config.items() if not key.startswith("_")}
        values = {}
        for key, value in options.items():
            if key in cls.__dataclass_fields__:
                values[key] = value
            elif key in FIXED:
                _expect(key, value, value in FIXED[key], " or ".join(map(repr, FIXED[key])))
            elif key not in IGNORED:
                _expect(key, value, value is None or value is False, "no such option")
        return cls(**_per_level(values))

    @property
    def time_channels(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def control_channels(self) -> tuple[int, ...]:
        """Return channels of the features that each level's control must have: the down blocks',
        then the mid block's.
        """
        return (*self.block_out_channels, self.block_out_channels[-1])


def _per_level(values: dict) -> dict:
    """Spell out what diffusers lets a config abbreviate; InputError where an entry cannot be an SDXL-like UNet's."""
    levels = len(_as_tuple(values["block_out_channels"], 1))
    for key in (*PER_LEVEL, "cross_attention_dim"):
        spelled = _as_tuple(values[key], levels)
        fits = len(spelled) == levels and all(isinstance(entry, int) for entry in spelled)
        _expect(key, values[key], fits, f"{levels} whole numbers")
        values[key] = spelled
    for key, types in BLOCK_TYPES.items():
        fits = isinstance(values[key], (list, tuple)) and len(values[key]) == levels
        fits = fits and all(entry in types for entry in values[key])
        _expect(key, values[key], fits, f"{levels} of {' or '.join(types)}")
        values[key] = tuple(values[key])
    text = values["cross_attention_dim"]
    _expect("cross_attention_dim", text, len(set(text)) == 1, "the same number at every level")
    values["cross_attention_dim"] = text[0]
    for key in WHOLE:
        _expect(key, values[key], type(values[key]) is int and values[key] > 0, "a whole number above 0")
    _expect("norm_eps", values["norm_eps"], type(values["norm_eps"]) in (int, float), "a number")
    return values


def _as_tuple(value: object, levels: int) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def _expect(key: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise InputError(
            f"UNet config: {key} = {value!r} is not supported, expected {expected} (an SDXL-like UNet)"
        )
