"""T2I-Adapters: loading one, and whether it fits the model.

An adapter ("full_adapter_xl") turns a condition image (1, C, H, W) into four feature maps, at strides 16, 16, 32, 32
from the image. What they do to the UNet is `runtime.control.features`'s.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file
from torch import nn

from runtime.control.adapters import TYPE
from runtime.control.levels import COUNT, STRIDES
from runtime.errors import InputError
from runtime.loading.hub import cache_folder, fetch_files, is_hub_id
from runtime.loading.quiet import quiet
from runtime.loading.weights import check_finite_weights, chosen_weights, content, load_pickle, tensor_shapes
from runtime.machine.files import expand, read_json, reads

EMBEDDED = Path(__file__).parents[1] / "embedded" / "adapters"
STRIDE = STRIDES[0]  # of its pixel unshuffle
MARKERS = (
    "body.0.resnets.0.block1.weight",
    "body.0.block1.weight",
)  # in diffusers' layout, and the original one
NONE = "no T2I-Adapter's tensors"
# A part of a tensor's name -> the kind of file it is in; the first that fits counts.
OTHER_KINDS = {
    "lllite_": "a ControlNet-LLLite",
    "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
    "lora_": "a LoRA (pass it as one of loras)",
    "model.diffusion_model.": "a whole model",
    "down_blocks.": "one part of a model in diffusers' layout",
    "decoder.": "a VAE",
}


def embedded_adapters() -> dict[str, Path]:
    """Return the adapters that come with the embedded model: name -> folder."""
    return {path.name: path for path in sorted(EMBEDDED.glob("*")) if path.is_dir()}


@reads()
def load_adapter(
    source: str | Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    name: str | None = None,
) -> T2IAdapter:
    """Load a T2I-Adapter for SDXL, in eval mode.

    source: a folder in diffusers' layout, a .safetensors file in diffusers' or the original layout, the name of an
        embedded adapter ("canny"), or a hub id "organisation/name" (Hugging Face's cache first, then the network).
    allow_pickle: also read .bin, .pt, .pth and .ckpt files, tensors only (weights_only=True).
    name: what to call the adapter in an error; `source` by default.

    Raises InputError where it is missing, truncated, of another type, or a pickle that was not asked for.
    """
    label = f"adapter {source}" if name is None else f"adapter {name} ({source})"
    path, declared = find_adapter(str(source), label, allow_pickle), {}
    if path.is_dir():
        declared = _read_config(path, label)
        files, _ = chosen_weights(path, dtype, allow_pickle)
    else:
        files = {path: tensor_shapes(path, allow_pickle)}
    given = {key: shape for shapes in files.values() for key, shape in shapes.items()}
    names = _diffusers_names(without_prefix(given, MARKERS))
    _check_kind(given, names, label)
    shapes = {new: given[old] for new, old in names.items()}
    config = _config_of(shapes, label)
    for key in config.keys() & declared.keys():
        if declared[key] != config[key]:
            raise InputError(
                f"{label}: config.json has {key} {declared[key]}, its weights have {config[key]}"
            )
    with torch.device("meta"):
        adapter = T2IAdapter(**config)
    fill(adapter, list(files), names, shapes, label, TYPE)
    check_finite_weights({"adapter": adapter}, label)
    with quiet():
        return adapter.to(device, dtype).eval()


def find_adapter(source: str, label: str, allow_pickle: bool) -> Path:
    """Return the folder or file of a T2I-Adapter or a ControlNet; of one on the hub, where its files were put."""
    for path in (expand(source), EMBEDDED / source):
        try:
            if path.exists():
                return path
        except OSError as error:  # a name that no file can have
            raise InputError(f"{label}: {error.strerror}; expected a folder, a file or a hub id") from error
    looked = f"looked in {Path(source).absolute()}, {EMBEDDED}"
    if is_hub_id(source):
        patterns = [
            "config.json",
            "diffusion_pytorch_model*.safetensors",
            "diffusion_pytorch_model*.index*.json",
        ]
        patterns += ["*.bin"] * allow_pickle
        for offline in (True, False):
            folder = fetch_files(source, patterns, offline=offline)
            if folder is not None and any(folder.glob("diffusion_pytorch_model*")):
                return folder
        looked = f"{looked}, {cache_folder(source)}, and it is not to be had from the hub"
    known = ", ".join(embedded_adapters()) or "none"
    raise InputError(
        f"{label}: not found, {looked}; "
        f"expected a folder, a .safetensors file, a hub id or an embedded adapter ({known})"
    )


def _read_config(folder: Path, label: str) -> dict:
    """Return a folder's config, once it has been found to be that of a T2I-Adapter for SDXL."""
    config = {"_class_name": "T2IAdapter", "adapter_type": "full_adapter"} | read_json(folder / "config.json")
    for key, expected in {
        "_class_name": "T2IAdapter",
        "adapter_type": TYPE,
        "downscale_factor": STRIDE,
    }.items():
        if config.get(key) != expected:
            raise InputError(
                f"{label}: its {key} is {config.get(key)}, expected {expected} (a T2I-Adapter for SDXL)"
            )
    return config


def fill(
    model: nn.Module,
    paths: Sequence[Path],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    label: str,
    what: str,
) -> None:
    """Give a model without values those of a file, or of its shards. names, shapes: of their tensors, by the model's.

    Raises InputError, saying that it is not a whole `what`, unless they have the model's tensors and no others.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in sorted(expected.keys() | shapes.keys()):
        if shapes.get(key) != expected.get(key):
            has, wanted = shapes.get(key, "missing"), expected.get(key, "no such tensor")
            raise InputError(f"{label}: not a whole {what}: {key} is {has}, expected {wanted}")
    found = {}
    for path in paths:
        found |= load_file(path) if content(path) == "safetensors" else load_pickle(path)
    weights = {key: found[names[key]] for key in shapes}
    if other := [key for key, value in weights.items() if not value.is_floating_point()]:
        raise InputError(f"{label}: {other[0]} is {weights[other[0]].dtype}; expected floating-point numbers")
    model.load_state_dict(weights, assign=True)


def without_prefix(names: Collection[str], markers: Iterable[str]) -> dict[str, str]:
    """Return a file's names by what they are without the one prefix of all, such as "module." of a wrapped model.

    markers: tensors of the model, by which it is known.
    """
    for name in names:
        for marker in markers:
            prefix = name.removesuffix(marker)
            if f".{name}".endswith(f".{marker}") and all(other.startswith(prefix) for other in names):
                return {other.removeprefix(prefix): other for other in names}
    return {name: name for name in names}


def _check_kind(given: Collection[str], names: Collection[str], label: str) -> None:
    """Raise InputError, saying what the file is, unless it has a tensor of a T2I-Adapter."""
    if any(name.startswith("adapter.body.") for name in names):
        return
    first = next(iter(given), "none")
    kinds = (kind for part, kind in OTHER_KINDS.items() if any(part in name for name in given))
    raise InputError(f"{label}: {next(kinds, NONE)}, first {first}; expected {TYPE}")


def _diffusers_names(tensors: Mapping[str, str]) -> dict[str, str]:
    """Return the tensors under diffusers' names; those of the original files number all residual blocks in one row."""
    flat = {int(m[1]) for key in tensors if (m := re.match(r"body\.(\d+)\.block1\.weight", key))}
    per_level = max(len(flat) // COUNT, 1)

    def rename(key: str) -> str:
        if not (match := re.fullmatch(r"body\.(\d+)\.(in_conv|block1|block2)\.(weight|bias)", key)):
            return key if key.startswith("adapter.") else f"adapter.{key}"
        level, block = divmod(int(match[1]), per_level)
        layer = match[2] if match[2] == "in_conv" else f"resnets.{block}.{match[2]}"
        return f"adapter.body.{level}.{layer}.{match[3]}"

    return {rename(key): value for key, value in tensors.items()}


def _config_of(shapes: Mapping[str, tuple[int, ...]], label: str) -> dict:
    """Return a T2IAdapter config that fits a file's tensors; a single file has none of its own."""
    if "adapter.body.0.out_conv.weight" in shapes:
        raise InputError(f"{label}: its type is light_adapter, expected {TYPE} (a T2I-Adapter for SDXL)")
    first = "adapter.body.{}.resnets.0.block1.weight"
    channels = [(shapes.get(first.format(level)) or (0,))[0] for level in range(COUNT)]
    unshuffled = (*shapes.get("adapter.conv_in.weight", ()), 0, 0)[1]
    if not unshuffled or not all(channels):
        raise InputError(f"{label}: {NONE}, first {next(iter(shapes), 'none')}; expected {TYPE}")
    if unshuffled % STRIDE**2:
        raise InputError(f"{label}: its type is full_adapter (for Stable Diffusion 1), expected {TYPE}")
    blocks = sum(f"adapter.body.0.resnets.{i}.block1.weight" in shapes for i in range(len(shapes)))
    return {
        "in_channels": unshuffled // STRIDE**2,
        "channels": channels,
        "num_res_blocks": blocks,
        "downscale_factor": STRIDE,
        "adapter_type": TYPE,
    }
