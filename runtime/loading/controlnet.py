"""ControlNets for SDXL: loading one, and whether it fits the model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from runtime.errors import InputError, first_line
from runtime.loading.adapter import fill, find_adapter, without_prefix
from runtime.loading.folder import load_component
from runtime.loading.quiet import quiet
from runtime.loading.weights import LOAD_ERRORS, check_finite_weights, tensor_shapes, weight_files
from runtime.machine.files import read_json
from runtime.model.config import MID_BLOCKS, ControlNetConfig, UNetConfig
from runtime.model.controlnet import ControlNet, ControlNetUnion

EXPECTED = "expected a ControlNet for SDXL"
# In names of a file's tensors: diffusers' layout, and the original one
MARKERS = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
ADD_EMBEDDING = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
# The kinds of control of a union by number (xinsir/controlnet-union-sdxl-1.0), under the names that they go by
UNION = (
    ("openpose", "pose"),
    ("depth",),
    ("hed", "pidi", "scribble", "ted", "softedge", "sketch"),
    ("canny", "lineart", "anime_lineart", "mlsd", "lines"),
    ("normal",),
    ("segment", "segmentation"),
    ("tile",),
    ("repaint", "inpaint"),
)
NO_UNION = "\0"  # in place of a name, which it cannot be, where no union is wanted
# Of SDXL, where a single file does not say; the UNet must have the same
HEAD_CHANNELS, SDXL = 64, {"addition_time_embed_dim": 256, "norm_num_groups": 32, "norm_eps": 1e-5}
ASSUMED = (*SDXL, "attention_head_dim", "flip_sin_to_cos", "freq_shift")


def load_controlnet(
    source: str | Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    name: str | None = None,
    unions: bool = True,
) -> ControlNet:
    """Load a ControlNet for SDXL, in eval mode.

    source: as `adapter.load_adapter`'s, of a ControlNetModel or a ControlNetUnionModel. name: what to call it in an
    error; of a union also which of its controls it is, such as "depth" or "depth-2" (see `UNION`). unions: whether one
    is wanted.

    Raises InputError where it is missing, truncated, of another kind, or a pickle that was not asked for.
    """
    label = f"adapter {source}" if name is None else f"adapter {name} ({source})"
    path = find_adapter(str(source), label, allow_pickle)
    with quiet():
        if path.is_dir():
            net = _load_folder(path, label, dtype, allow_pickle, name if unions else NO_UNION)
        else:
            net = _load_file(path, label, allow_pickle, name if unions else NO_UNION)
        check_finite_weights({"controlnet": net}, label)
        return net.to(device, dtype).eval()


def is_controlnet(path: Path, allow_pickle: bool = False) -> bool:
    """Return whether a folder or a file that is there holds a ControlNet of any kind, by its contents."""
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and "ControlNet" in str(read_json(config).get("_class_name"))
    return any(name.endswith(MARKERS) for name in tensor_shapes(path, allow_pickle))


def take(net: ControlNetModel | ControlNetUnionModel, name: str) -> ControlNet:
    """Return diffusers' ControlNet as ours, its weights shared. name: see `load_controlnet`."""
    label, union = f"adapter {name}", isinstance(net, ControlNetUnionModel)
    control = control_of(name, net.config.num_control_type, label) if union else None
    try:
        return ControlNet.from_diffusers(net, control)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error


def as_control(net: ControlNet, name: str, label: str) -> ControlNet:
    """Return a net for a second name, all of its weights shared: of a union another control."""
    if not isinstance(net, ControlNetUnion):
        return net
    other = copy.copy(net)
    other.control = control_of(name, net.config.num_control_type, label)
    return other


def control_of(name: str | None, count: int, label: str) -> int:
    """Return which of a union's `count` controls a name is; InputError where it is none."""
    if name == NO_UNION:
        raise InputError(f"{label}: a ControlNet-Union; expected a ControlNet of one control")
    stem = re.match(r"[a-z_]*", (name or "").lower())[0].rstrip("_")
    for number, names in enumerate(UNION[:count]):
        if stem in names:
            return number
    known = ", ".join(word for names in UNION[:count] for word in names)
    raise InputError(
        f"{label}: a ControlNet-Union, of which the name says the control; expected one of {known}, "
        "such as depth or depth-2"
    )


def check_controlnet(name: str, net: ControlNet, unet: UNetConfig, factor: int) -> None:
    """Raise InputError unless a ControlNet fits the UNet. factor: pixels of a latent's side."""
    own, label = net.config, f"adapter {name!r}"
    for key in (
        "in_channels",
        "cross_attention_dim",
        "projection_class_embeddings_input_dim",
        "addition_time_embed_dim",
        "skip_channels",
        *net.assumed,
    ):
        found, expected = getattr(own, key), getattr(unet, key)
        if found != expected:
            raise InputError(f"{label}: a ControlNet with {key} {found}, the UNet has {expected}")
    if factor != 8:
        raise InputError(f"{label}: a ControlNet reads latents of 8 pixels, the VAE's have {factor}")
    if own.conditioning_channels not in (1, 3):
        raise InputError(f"{label} reads {own.conditioning_channels} channels, expected 1 or 3")


def _load_folder(
    folder: Path, label: str, dtype: torch.dtype, allow_pickle: bool, name: str | None
) -> ControlNet:
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in ("ControlNetModel", "ControlNetUnionModel"):
        kind = "a T2I-Adapter" if kind == "T2IAdapter" else f"a {kind}"
        raise InputError(f"{label}: {kind}; {EXPECTED}")
    _check_generation(config.get("cross_attention_dim"), config.get("addition_embed_type"), label)
    # The weights tell: unions are published whose config calls them a ControlNetModel.
    files = weight_files(folder, dtype, allow_pickle)
    union = any("task_embedding" in tensor_shapes(file, allow_pickle) for file in files)
    try:
        known = ControlNetConfig.from_diffusers(config, union)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    control = control_of(name, known.num_control_type, label) if union else None
    model_class = ControlNetUnionModel if union else ControlNetModel
    net = load_component(model_class, folder, dtype, allow_pickle, strict=True)
    return ControlNet.from_diffusers(net, control)


def _load_file(path: Path, label: str, allow_pickle: bool, name: str | None) -> ControlNet:
    shapes = tensor_shapes(path, allow_pickle)
    try:
        names = _diffusers_names(shapes, label)
        shapes = {new: shapes[old] for new, old in names.items()}
        config = _config_of(shapes, label)
        known = ControlNetConfig.from_diffusers(config, "num_control_type" in config)
    except InputError as error:
        raise error if str(error).startswith(label) else InputError(f"{label}: {error}") from error
    except (*LOAD_ERRORS, IndexError, ArithmeticError) as error:  # of shapes that no such file has
        raise InputError(f"{label}: not a whole ControlNet: {first_line(error)}; {EXPECTED}") from error
    with torch.device("meta"):
        if known.num_control_type:
            net = ControlNetUnion(known, control_of(name, known.num_control_type, label))
        else:
            net = ControlNet(known)
    fill(net, [path], names, shapes, label, "ControlNet")
    net.assumed = ASSUMED
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


def _diffusers_names(names: Iterable[str], label: str) -> dict[str, str]:
    """Return a file's tensors: diffusers' name -> the file's own. InputError for one that has no place."""
    names = list(names)
    if not any(name.endswith(MARKERS) for name in names):
        kind = "a T2I-Adapter" if any("body.0." in name for name in names) else "no ControlNet"
        raise InputError(f"{label}: {kind}, its first tensor is {next(iter(names), 'none')}; {EXPECTED}")
    given = without_prefix(names, MARKERS)
    if MARKERS[0] in given:
        return given
    if any("lora_controlnet" in name or name.endswith(".down") for name in names):
        raise InputError(f"{label}: a Control-LoRA, which is not read; {EXPECTED}")
    halved = [int(m[1]) for name in names if (m := re.search(r"input_blocks\.(\d+)\.0\.op\.weight$", name))]
    if not halved:
        raise InputError(f"{label}: no input_blocks.N.0.op.weight in it; {EXPECTED} in the original layout")
    found = convert_controlnet_checkpoint(dict(given), {"layers_per_block": min(halved) - 1})
    for name in names:
        if match := re.search(r"(label_emb\.0\.[02])\.(weight|bias)$", name):
            found[f"{ADD_EMBEDDING[match[1]]}.{match[2]}"] = name
    found = {new: old for new, old in found.items() if old is not None}
    if lost := sorted(set(names) - set(found.values())):
        raise InputError(f"{label}: {len(lost)} tensors without a place, first {lost[0]}; {EXPECTED}")
    return found


def _config_of(shapes: Mapping[str, tuple[int, ...]], label: str) -> dict[str, object]:
    """Return the config of a ControlNetModel, or a ControlNetUnionModel, that fits a file's tensors."""

    def first(name: str, dim: int) -> int | None:
        shape = shapes.get(name, ())
        return shape[dim] if len(shape) > dim else None

    def count(pattern: str) -> int:
        return len({m[0] for name in shapes if (m := re.match(pattern, name))})

    levels = count(r"down_blocks\.\d+\.")
    text = next((shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")), None)
    _check_generation(text, first("add_embedding.linear_1.weight", 1), label)
    channels = [first(f"down_blocks.{i}.resnets.0.conv1.weight", 0) or 0 for i in range(levels)]
    attends = [count(rf"down_blocks\.{i}\.attentions\.0\.norm") > 0 for i in range(levels)]
    depths = [count(rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.\d+\.") for i in range(levels)]
    middle = count(r"mid_block\.attentions\.0\.transformer_blocks\.\d+\.")
    depths[-1:] = [middle if not any(depths[-1:]) else depths[-1]]
    embedding = "controlnet_cond_embedding"
    widths = [first(f"{embedding}.conv_in.weight", 0)]
    widths += [first(f"{embedding}.blocks.{i}.weight", 0) for i in (1, 3, 5)]
    config = {
        "in_channels": first("conv_in.weight", 1),
        "conditioning_channels": first(f"{embedding}.conv_in.weight", 1),
        "conditioning_embedding_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends],
        "mid_block_type": MID_BLOCKS[0 if "mid_block.resnets.1.conv1.weight" in shapes else 1],
        "block_out_channels": channels,
        "layers_per_block": count(r"down_blocks\.0\.resnets\.\d+\."),
        "transformer_layers_per_block": depths,
        "attention_head_dim": [max(c // HEAD_CHANNELS, 1) for c in channels],
        "cross_attention_dim": text,
        "use_linear_projection": len(shapes.get("mid_block.attentions.0.proj_in.weight", (0, 0))) == 2,
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": first("add_embedding.linear_1.weight", 1),
    } | SDXL
    if "task_embedding" in shapes:
        del config["mid_block_type"]
        config |= {
            "num_control_type": shapes["task_embedding"][0],
            "addition_time_embed_dim": _embedded(shapes),
            "num_trans_channel": shapes["task_embedding"][-1],
            "num_trans_layer": count(r"transformer_layes\.\d+\."),
            "num_trans_head": 8,
            "num_proj_channel": first("spatial_ch_projs.weight", 0),
        }
    return config


def _embedded(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return a union's addition_time_embed_dim: its kinds of control are embedded side by side."""
    width = (*shapes.get("control_add_embedding.linear_1.weight", ()), 0, 0)[1]
    return width // max(shapes["task_embedding"][0], 1)


def _check_generation(text: object, added: object, label: str) -> None:
    """Raise InputError for a ControlNet of another Stable Diffusion. text: features of its text; added: None there."""
    if added is None:
        kinds = {"768": "Stable Diffusion 1.5", "1024": "Stable Diffusion 2"}
        raise InputError(f"{label}: a ControlNet for {kinds.get(str(text), 'another model')}; {EXPECTED}")
