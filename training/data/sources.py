"""Where training samples come from: a folder of images, Hugging Face datasets, WebDataset tars.

A source gives encoded files and captions, in an order of its own that stays the same; decoding them is the reader's.
"""

from __future__ import annotations

import re

from runtime.errors import InputError
from runtime.machine.files import expand
from training.config import TrainConfig
from training.data.folder import FolderSource
from training.data.hub import HubSource
from training.data.sample import Source
from training.data.tars import TarSource

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(pipe|file):")
EXPECTED = "expected an image folder, WebDataset tars, a .parquet file, or hf:PATH[@SPLIT]"


def open_source(config: TrainConfig) -> Source:
    """Return the source that `config.data` names. Raises InputError where it is not there or lacks
    what is asked for.
    """
    data = config.data
    if not data:
        raise InputError(f"data: not given; {EXPECTED}")
    if data.startswith("hf:"):
        path, _, split = data.removeprefix("hf:").partition("@")
        return HubSource(config, path, split or "train")
    if URL.match(data):
        raise InputError(f"data {data}: {URL.match(data)[0]} is not read; download it first; {EXPECTED}")
    if data.endswith(".tar"):
        return TarSource(config)
    path = expand(data)
    if data.endswith(".parquet") and path.is_file():
        return HubSource(config, str(path), "train", path.parent)
    if path.is_file():
        raise InputError(f"data {data}: a file of another kind; {EXPECTED}")
    if not path.is_dir():
        raise InputError(f"data {data}: no such folder; {EXPECTED}")
    if not FolderSource.has_images(path) and next(path.rglob("*.parquet"), None):
        return HubSource(config, str(path), "train", path)
    return FolderSource(path, config)
