"""Engine folders of the tiny SDXL, built once a run as a user builds them, and the model and adapter in them."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

from export import build_engine
from tests import saved_model
from tests.tiny import make_adapter

SIZES = {"height": (32, 64, 96), "width": (32, 64, 96), "batch": (1, 1, 2)}
TARGETS = ("onnxruntime", "openvino")
COMPONENTS = ("text_encoder", "text_encoder_2", "adapter", "unet", "vae_decoder", "vae_encoder")

_DIRECTORY = tempfile.TemporaryDirectory(prefix="localcontrol-engines-")  # removed when the run ends


@cache
def adapter() -> Path:
    """The tiny adapter, saved as diffusers does: it is called canny in the engine folders."""
    path = Path(_DIRECTORY.name) / "adapter"
    make_adapter().save_pretrained(path)
    return path


@cache
def folder(target: str, components: tuple[str, ...] = COMPONENTS) -> Path:
    """An engine folder in fp32 for every size of `SIZES`: not to be changed."""
    path = Path(_DIRECTORY.name) / f"{target}-{len(components)}-{components[0]}"
    sizes = [part for name, size in SIZES.items() for part in (f"--{name}", ":".join(map(str, size)))]
    model = ["--model", str(saved_model.folder()), "--adapter", f"canny={adapter()}", "--precision", "fp32"]
    where = ["--target", target, "--out", str(path), "--components", ",".join(components)]
    assert build_engine.main([*model, *where, *sizes]) == 0
    return path


def copy_folder(target: str, to: Path, components: tuple[str, ...] = COMPONENTS) -> Path:
    """A copy of the folder that a test may spoil."""
    return shutil.copytree(folder(target, components), to / "engines")
