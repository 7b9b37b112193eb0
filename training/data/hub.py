"""Training samples of a Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from runtime.errors import InputError, first_line
from training.config import TrainConfig
from training.data.cache import digest
from training.data.sample import Sample, column_named, inside, stat_line


class HubSource:
    """A Hugging Face dataset: PATH[@SPLIT], of the hub, in parquet files, or as `save_to_disk` left it."""

    def __init__(self, config: TrainConfig, path: str, split: str, folder: Path | None = None):
        """folder: of files that were found and not named as a dataset; nothing outside of it is opened."""
        self.config, self.unused, self.folder = config, [], folder
        try:
            import datasets
        except ImportError as error:
            raise InputError("data hf:...: needs the package datasets; pip install datasets") from error
        try:
            table, version = _open_table(config, path, split)
            table = table if table.features else table._resolve_features()
        except Exception as error:  # whatever the many formats raise
            raise InputError(f"data {config.data}: {error}") from error
        self.columns = {
            "image": column_named(config.image_key, table.features),
            "caption": column_named(config.caption_key, table.features),
            "condition": config.condition_from,
            "mask": config.mask_from,
        }
        for what, column in self.columns.items():
            if column and column not in table.features:
                raise InputError(
                    f"data {config.data}: no column {column!r} for the {what}; it has {', '.join(table.features)}"
                )
        self.columns = {what: column for what, column in self.columns.items() if column}
        table = table.select_columns(list(self.columns.values()))
        for what, column in self.columns.items():
            if what != "caption":
                table = self._cast(table, column, datasets.Image(decode=False))
        self.table = table
        self.fingerprint = digest(config.data, json.dumps(self.columns), version)

    def _cast(self, table, column: str, feature):
        try:
            return table.cast_column(column, feature)
        except Exception as error:  # whatever pyarrow raises on numbers, texts in lists ...
            raise InputError(
                f"data {self.config.data}: column {column!r} holds no pictures: {first_line(error)}"
            ) from error

    def _rows(self, part: int, parts: int) -> Iterator[tuple[int, dict]]:
        try:
            yield from _every(self.table, part, parts)
        except Exception as error:  # a stream is decoded as it goes by
            raise InputError(f"data {self.config.data}: cannot be read on: {first_line(error)}") from error

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        for i, row in self._rows(part, parts):
            caption = row[self.columns["caption"]]
            caption = caption[0] if isinstance(caption, (list, tuple)) and caption else caption
            columns = ((what, column) for what, column in self.columns.items() if what != "caption")
            try:
                files = {what: _bytes(row[column], self.folder) for what, column in columns}
            except Exception as error:  # whatever the many file systems raise
                yield i, Sample(f"row {i}", error=first_line(error))
            else:
                yield i, Sample(f"row {i}", caption=caption if isinstance(caption, str) else None, **files)


def _open_table(config: TrainConfig, path: str, split: str) -> tuple[Any, str]:
    """Return a dataset or stream, and what changes when its data does."""
    import datasets

    if path.endswith(".parquet"):
        files = {"path": "parquet", "data_files": path}
    else:
        files = {"path": path}
    if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
        table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"no split {split!r}; it has {', '.join(table)}")
            table = table[split]
    elif config.streaming:
        builder = datasets.load_dataset_builder(**files)
        return builder.as_streaming_dataset(split), digest(builder.hash, *map(stat_line, _local_files(path)))
    else:
        table = datasets.load_dataset(**files, split=split)
    return table, table._fingerprint


def _local_files(path: str) -> list[Path]:
    """Return the files of a dataset that lies here; none of one of the hub."""
    local = Path(path)
    return [local] if local.is_file() else sorted(p for p in local.rglob("*") if p.is_file())


def _bytes(value: dict | None, folder: Path | None) -> bytes:
    if value is None:
        return b""
    if value["bytes"] is not None:
        return value["bytes"]
    if folder is not None:
        path = inside(folder, folder, value["path"])
        if path is None or "://" in value["path"]:
            raise InputError(f"names {value['path']}, which is not in the data's folder")
        return Path(path).read_bytes()
    from datasets.utils.file_utils import xopen  # a stream's files may lie on the hub, or in an archive

    with xopen(value["path"], "rb") as file:
        return file.read()


def _every(table, part: int, parts: int) -> Iterator[tuple[int, dict]]:
    if hasattr(table, "__len__"):
        return ((i, table[i]) for i in range(part, len(table), parts))
    # A stream: all of it goes by. In batches of one, as a worker that iterates over it gets a share of its files.
    rows = ({column: values[0] for column, values in batch.items()} for batch in table.iter(batch_size=1))
    return islice(enumerate(rows), part, None, parts)
