"""Where training samples come from: a folder of images, Hugging Face datasets, WebDataset tars.

A source gives encoded files and captions, in an order of its own that stays the same; decoding them is the reader's.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import InputError
from runtime.machine.files import expand
from training.config import TrainConfig
from training.data.cache import digest

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Sample:
    """One sample as it lies on the disk: files' bytes. `error` says why there are none."""

    name: str
    image: bytes = b""
    caption: str | None = None
    condition: bytes | None = None
    mask: bytes | None = None
    error: str | None = None


class Source(Protocol):
    fingerprint: str  # changes when the data does, as far as can be told without reading it all

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        """Samples part, part + parts, part + 2 parts, ... with their numbers."""


def open_source(config: TrainConfig) -> Source:
    """Return the source that `config.data` names. Raises InputError where it is not there or lacks
    what is asked for.
    """
    data = config.data
    if not data:
        raise InputError("data: not given; expected an image folder, WebDataset tars or hf:PATH[@SPLIT]")
    if data.startswith("hf:"):
        return HubSource(config)
    if data.endswith(".tar"):
        return TarSource(config)
    folder = expand(data)
    if not folder.is_dir():
        raise InputError(
            f"data {data}: no such folder; expected an image folder, .tar files or hf:PATH[@SPLIT]"
        )
    return FolderSource(folder, config)


class FolderSource:
    """Images in a folder and its subfolders, with captions beside them: `name.txt`, or metadata.jsonl in the folder."""

    def __init__(self, folder: Path, config: TrainConfig):
        extra = [expand(f) for f in (config.condition_from, config.mask_from) if f]
        for path in extra:
            if not path.is_dir():
                raise InputError(
                    f"{path}: no such folder; expected one of files named as the images in {folder}"
                )
        apart = [path.resolve() for path in extra]
        out = expand(config.out).resolve()
        if folder.resolve() in out.parents:  # what a run draws is not data
            apart.append(out)
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
        self.images = [p for p in found if not any(a in p.resolve().parents for a in apart)]
        if not self.images:
            raise InputError(f"data {folder}: no images; expected files ending in {', '.join(IMAGES)}")
        self.folder, self.captions = folder, _captions(folder, self.images, config.caption_key)
        if not any(caption is not None for caption in self.captions):
            raise InputError(
                f"data {folder}: no captions; expected a .txt beside each image, or a metadata.jsonl of "
                f'{{"file_name": ..., "{config.caption_key}": ...}} lines'
            )
        self.conditions, self.masks = (
            [None] * len(self.images)
            if given is None
            else _matching(self.images, folder, expand(given), what)
            for given, what in ((config.condition_from, "conditions"), (config.mask_from, "masks"))
        )
        files = [p for p in (*self.images, *self.conditions, *self.masks) if p is not None]
        stats = (f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in ((p, p.stat()) for p in files))
        self.fingerprint = digest(*stats, *(str(caption) for caption in self.captions))

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        for i in range(part, len(self.images), parts):
            name = str(self.images[i].relative_to(self.folder))
            try:
                files = (self.images[i], self.conditions[i], self.masks[i])
                image, condition, mask = (p and p.read_bytes() for p in files)
            except OSError as error:
                yield i, Sample(name, error=error.strerror or str(error))
            else:
                yield i, Sample(name, image, self.captions[i], condition, mask)


def _captions(folder: Path, images: list[Path], key: str) -> list[str | None]:
    table = folder / "metadata.jsonl"
    if not table.exists():
        texts = [image.with_suffix(".txt") for image in images]
        return [t.read_text("utf-8-sig", "replace").strip() if t.exists() else None for t in texts]
    captions = {}
    lines = table.read_bytes().split(b"\n")  # of bytes: Unicode has more ends of lines
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else {"file_name": ""}
            captions[entry["file_name"]] = entry.get(key)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f'{table}: line {number}: expected JSON with "file_name" and "{key}"') from error
    return [captions.get(image.relative_to(folder).as_posix()) for image in images]


def _matching(images: list[Path], folder: Path, given: str | None, what: str) -> list[Path | None]:
    """Return the file of the same name in the folder `given`, whatever its ending, for every image."""
    if given is None:
        return [None] * len(images)
    other = expand(given)
    found = {
        p.relative_to(other).with_suffix(""): p
        for p in sorted(other.rglob("*"))
        if p.suffix.lower() in IMAGES
    }
    names = [image.relative_to(folder).with_suffix("") for image in images]
    absent = [str(name) for name in names if name not in found]
    if absent:
        listed = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise InputError(f"{what} in {other}: {len(absent)} of {len(names)} images have none: {listed}")
    return [found[name] for name in names]


class HubSource:
    """A Hugging Face dataset: "hf:PATH[@SPLIT]", of the hub, in parquet files, or as `save_to_disk` left it."""

    def __init__(self, config: TrainConfig):
        try:
            import datasets
        except ImportError as error:
            raise InputError("data hf:...: needs the package datasets; pip install datasets") from error
        try:
            table, version = _open_table(config)
        except Exception as error:  # whatever the many formats raise
            raise InputError(f"data {config.data}: {error}") from error
        table = table if table.features else table._resolve_features()
        self.columns = {
            "image": config.image_key, "caption": config.caption_key, "condition": config.condition_from,
            "mask": config.mask_from,
        }  # fmt: skip
        for what, column in self.columns.items():
            if column and column not in table.features:
                raise InputError(
                    f"data {config.data}: no column {column!r} for the {what}; it has {', '.join(table.features)}"
                )
        self.columns = {what: column for what, column in self.columns.items() if column}
        table = table.select_columns(list(self.columns.values()))
        for what, column in self.columns.items():
            if what != "caption":
                table = table.cast_column(column, datasets.Image(decode=False))
        self.table = table
        self.fingerprint = digest(config.data, json.dumps(self.columns), version)

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        for i, row in _every(self.table, part, parts):
            caption = row[self.columns["caption"]]
            caption = caption[0] if isinstance(caption, (list, tuple)) and caption else caption
            columns = ((what, column) for what, column in self.columns.items() if what != "caption")
            try:
                files = {what: _bytes(row[column]) for what, column in columns}
            except OSError as error:
                yield i, Sample(f"row {i}", error=str(error))
            else:
                yield i, Sample(f"row {i}", caption=caption if isinstance(caption, str) else None, **files)


def _open_table(config: TrainConfig) -> tuple[Any, str]:
    """Return the dataset or stream that `config.data` names, and what changes when its data does."""
    import datasets

    path, _, split = config.data.removeprefix("hf:").partition("@")
    split = split or "train"
    if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
        table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"no split {split!r}; it has {', '.join(table)}")
            table = table[split]
    elif config.streaming:
        builder = datasets.load_dataset_builder(path)
        return builder.as_streaming_dataset(split), builder.hash
    else:
        table = datasets.load_dataset(path, split=split)
    return table, table._fingerprint


def _bytes(value: dict | None) -> bytes:
    if value is None:
        return b""
    if value["bytes"] is not None:
        return value["bytes"]
    from datasets.utils.file_utils import xopen  # a stream's files may lie on the hub, or in an archive

    with xopen(value["path"], "rb") as file:
        return file.read()


def _every(table, part: int, parts: int) -> Iterator[tuple[int, dict]]:
    if hasattr(table, "__len__"):
        return ((i, table[i]) for i in range(part, len(table), parts))
    # A stream: all of it goes by. In batches of one, as a worker that iterates over it gets a share of its files.
    rows = ({column: values[0] for column, values in batch.items()} for batch in table.iter(batch_size=1))
    return islice(enumerate(rows), part, None, parts)


class TarSource:
    """WebDataset tars: files of one name make a sample, its image, its caption (.txt, or a key of .json)."""

    def __init__(self, config: TrainConfig):
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise InputError(
                f"data {config.data}: needs the package webdataset; pip install webdataset"
            ) from error
        self.tars = [expand(url) for url in expand_urls(config.data)]
        for path in self.tars:
            if not path.is_file():
                raise InputError(f"data {config.data}: no such file: {path}")
            if not _is_whole(path):
                raise InputError(f"data {config.data}: {path} is cut off; expected a tar with its end")
        self.caption_key, self.condition, self.mask = (
            config.caption_key,
            config.condition_from,
            config.mask_from,
        )
        stats = ((p, p.stat()) for p in self.tars)
        self.fingerprint = digest(*(f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats))

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        from webdataset import WebDataset

        # all of it: webdataset would by itself give each worker some of the tars
        whole = {"nodesplitter": None, "workersplitter": None, "shardshuffle": False, "empty_check": False}
        stream = enumerate(WebDataset([str(p) for p in self.tars], **whole))
        try:
            for i, row in islice(stream, part, None, parts):
                yield i, self._sample(row)
        except (OSError, ValueError, EOFError, tarfile.TarError) as error:
            raise InputError(f"data {', '.join(map(str, self.tars))}: a broken tar: {error}") from error

    def _sample(self, row: dict) -> Sample:
        name = row["__key__"]
        apart = (self.condition, self.mask)
        endings = (ending[1:] for ending in IMAGES if ending[1:] not in apart)
        image = next((row[ending] for ending in endings if ending in row), b"")
        caption = row["txt"].decode("utf-8", "replace").strip() if "txt" in row else None
        if caption is None and "json" in row:
            try:
                caption = json.loads(row["json"]).get(self.caption_key)
            except (ValueError, AttributeError):
                return Sample(name, error="its .json is not a JSON object")
        condition, mask = (ending and row.get(ending, b"") for ending in (self.condition, self.mask))
        return Sample(name, image, caption, condition, mask)


def _is_whole(tar: Path) -> bool:
    """Return whether it has a tar's end, two blocks of zeros; tarfile takes what is cut off between two files for
    whole.
    """
    with tar.open("rb") as file:
        file.seek(max(0, tar.stat().st_size - 1024))
        return file.read() == bytes(1024)
