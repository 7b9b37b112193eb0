"""Weight files: found and checked before anything large is read.

diffusers and transformers go on quietly where a weight is missing (a random one takes its place) and stop with
a long trace where a file is cut short. Here the headers are read first, and what is wrong is one line that
names the file.
"""

import hashlib
import pickle
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from runtime.arguments import is_finite_number
from runtime.errors import InputError, first_line
from runtime.machine.files import read_json

NESTED = 3  # how deep a "state_dict" may be within another
# diffusers' and transformers' names, the safe ones first
WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
# What the loaders raise on files that are not what they should be.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)


def tensor_shapes(path: Path, allow_pickle: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a weight file, from its header: no weight is read.

    Raises InputError where the file is missing, truncated, of another kind, or a pickle nobody asked for.
    """
    if not path.is_file():
        raise InputError(f"{path}: weight file missing")
    kind = content(path)
    if kind == "safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: not a whole .safetensors file (truncated?): {first_line(error)}"
            ) from error
    if kind != "pickle":
        raise InputError(f"{path}: {kind}; expected a .safetensors file")
    if not allow_pickle:
        raise InputError(
            f"{path}: a pickle, which may run code when opened; expected .safetensors (or set allow_pickle)"
        )
    tensors = load_pickle(path, "meta")
    return {name: tuple(value.shape) for name, value in tensors.items()}


def content(path: Path) -> str:
    """Return what a file is by its first bytes: "safetensors", "pickle", or words for an error. No suffix counts."""
    try:
        with path.open("rb") as file:
            start, size = file.read(512), path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a weight file (download it again)"
    if start.startswith(b"GGUF"):
        return "a GGUF file, which is not read"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:  # the length of its header
        return "safetensors"
    if start.startswith((b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))):
        return "pickle"
    if path.suffix.lower() == ".safetensors":  # a damaged one, which its reader says
        return "safetensors"
    return f"not a weight file ({path.suffix or 'no suffix'})" if size else "an empty file"


def integer_weights(path: Path) -> list[str]:
    """Return the names of the weights that are whole numbers, of a file that `tensor_shapes` has read."""
    if content(path) != "safetensors":
        tensors = load_pickle(path, "meta")
        whole = [name for name, value in tensors.items() if not value.is_floating_point()]
    else:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        whole = [name for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]
    return [name for name in whole if name.endswith(".weight")]


def load_pickle(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read a file of plain tensors by name, nothing else in it being run. Raises InputError where it holds none."""
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except (
        Exception
    ) as error:  # on damaged data the unpickler raises a dozen types, IndexError to struct.error
        if "weights_only" in str(error):  # PyTorch advises to run whatever is in it
            raise InputError(f"{path}: it holds more than tensors; expected plain tensors") from error
        raise InputError(f"{path}: not a whole file of plain tensors: {first_line(error)}") from error
    for _ in range(NESTED):
        if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
            tensors = tensors["state_dict"]
    if not isinstance(tensors, Mapping):
        raise InputError(f"{path}: expected named tensors, got a {type(tensors).__name__}")
    # A LoRA's alpha is a plain number in some files.
    tensors = {
        str(name): torch.tensor(value) if str(name).endswith(".alpha") and is_finite_number(value) else value
        for name, value in tensors.items()
    }
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    for name, value in tensors.items():
        if value.layout != torch.strided or (value.is_meta and device != "meta"):
            dense = value.layout == torch.strided
            kind = "without values" if dense else f"in {str(value.layout).removeprefix('torch.')}"
            raise InputError(f"{path}: {name}: a tensor {kind}; expected dense ones, with values")
    return tensors


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Return one tensor of a file that `tensor_shapes` has read."""
    return read_tensors(path, [name])[name]


def read_tensors(path: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return some tensors of a file that `tensor_shapes` has read, by name."""
    if content(path) != "safetensors":
        tensors = load_pickle(path)
        return {name: tensors[name] for name in names}
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names}


def header(path: Path) -> dict[str, str]:
    """Return what a file that `tensor_shapes` has read says of itself; a pickle says nothing."""
    if content(path) != "safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextmanager
def with_suffix(path: Path) -> Iterator[Path]:
    """Yield a name for a file that loaders which go by the suffix read as what it is."""
    if content(path) != "safetensors" or path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"{path.stem}.safetensors"
        link.symlink_to(path.absolute())
        yield link


def find_weights(folder: Path, dtype: torch.dtype, allow_pickle: bool = False) -> dict:
    """Check the weight files in one component's folder; return from_pretrained's arguments that choose them.

    Accepted: diffusers' and transformers' names, whole or sharded, plain or the fp16 variant (taken where
    float16 is wanted or nothing else is there). Raises InputError naming the file that is missing, truncated
    or a pickle.
    """
    return chosen_weights(folder, dtype, allow_pickle)[1]


def weight_files(folder: Path, dtype: torch.dtype, allow_pickle: bool = False) -> list[Path]:
    """Return the files that `find_weights` has chosen."""
    return list(chosen_weights(folder, dtype, allow_pickle)[0])


def chosen_weights(
    folder: Path, dtype: torch.dtype, allow_pickle: bool = False
) -> tuple[dict[Path, dict], dict]:
    """Return the files that `find_weights` has chosen, each with its `tensor_shapes`, and what that returns."""
    for name in WEIGHT_NAMES:
        for variant in ("fp16", None) if dtype == torch.float16 else (None, "fp16"):
            if files := _files(folder, name, variant):
                shapes = {file: tensor_shapes(file, allow_pickle) for file in files}
                _check_once(shapes)
                return shapes, {"variant": variant, "use_safetensors": name.endswith(".safetensors")}
    others = sorted(path.name for path in folder.glob("*.safetensors*"))
    found = f", found {others[0]}" if others else ""
    raise InputError(
        f"{folder}: weight file missing{found}, expected diffusion_pytorch_model.safetensors or model.safetensors"
    )


def _check_once(shapes: Mapping[Path, Collection[str]]) -> None:
    """Raise InputError where two of a model's files give a tensor other values: the loaders take the last."""
    found: dict[str, Path] = {}
    for file, names in shapes.items():
        for name in sorted(found.keys() & set(names)):
            if not torch.equal(read_tensor(file, name), read_tensor(found[name], name)):
                raise InputError(f"{file}: {name} is another in {found[name].name}; expected it in one file")
        found |= dict.fromkeys(names, file)


def _files(folder: Path, name: str, variant: str | None) -> list[Path]:
    """Return the files that hold `name`'s weights: itself or the shards its index names; none where
    neither is there.
    """
    stem, suffix = name.rsplit(".", 1)
    infix = f".{variant}" if variant else ""
    whole = folder / f"{stem}{infix}.{suffix}"
    if whole.exists():
        return [whole]
    index = folder / f"{name}.index{infix}.json"
    if not index.exists():
        return []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(x, str) for x in shards.values()):
        raise InputError(f"{index}: expected a weight_map that names the weight files")
    return [folder / shard for shard in sorted(set(shards.values()))]


def check_finite_weights(modules: Mapping[str, nn.Module], source: str) -> None:
    """Raise InputError, naming the first such weight, where a weight is NaN or infinite.

    One pass over the memory: a sum is finite only where all its terms are.
    """
    for part, module in modules.items():
        named = list(module.named_parameters())
        sums = torch.stack([weight.sum(dtype=torch.float32) for _, weight in named]).cpu()
        if not sums.isfinite().all():
            name = named[int((~sums.isfinite()).nonzero()[0])][0]
            raise InputError(f"{source}: NaN or infinity in the weights, first in {part} {name}")


def weights_digest(*models: nn.Module) -> str:
    """Return a hash of the models' weights: names, shapes, dtypes and values."""
    sha = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()):
            sha.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            sha.update(_bytes(value))
    return sha.hexdigest()[:32]


def hash_tensor(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's values."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: torch.Tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
