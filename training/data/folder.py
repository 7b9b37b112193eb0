"""Training samples of a folder of images, in the layouts of Hugging Face, kohya and diffusers' examples."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError
from runtime.machine.files import expand
from training.config import TrainConfig
from training.data.cache import digest
from training.data.sample import (
    IMAGES,
    LARGEST_FILE,
    Sample,
    column_named,
    decode_text,
    inside,
    is_litter,
    stat_line,
)
from training.data.tables import is_table, read_table

TEXTS = (".txt", ".caption")  # beside an image
CONDITIONS = "conditioning_images"  # diffusers' examples: a folder beside "images"


@dataclass
class Row:
    """One sample's files. name: within the data. text: where its caption lies. error: why it cannot be used."""

    name: str
    image: Path | None = None
    caption: str | None = None
    condition: Path | None = None
    mask: Path | None = None
    text: Path | None = None
    error: str | None = None


class FolderSource:
    """Images in a folder and its subfolders; of a folder with `train` in it, those in there.

    Captions are in tables (see `tables`), each for the folder that it lies in and those below, or beside the images,
    as `name.txt` or `name.caption`. Conditions and masks are in a folder of files named as the images, or in a
    table's columns.
    """

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder, self.config, self.unused = folder, config, []
        train = folder / "train"
        self.root = train if train.is_dir() and self.has_images(train) else folder
        files = self._files([expand(path).resolve() for path in (config.out, config.cache) if path])
        tables = [p for p in files if is_table(p)]
        given = {
            w: self._place(f)
            for w, f in (("condition", config.condition_from), ("mask", config.mask_from))
            if f
        }
        folders = {what: place for what, place in given.items() if isinstance(place, Path)}
        pictures = [p for p in files if p.suffix.lower() in IMAGES and not _within(p, folders.values())]
        self.rows = self._rows(tables, pictures, {w: p for w, p in given.items() if isinstance(p, str)})
        if not self.rows:
            raise InputError(f"data {folder}: no images; expected files ending in {', '.join(IMAGES)}")
        if not any(row.caption is not None or row.error for row in self.rows):
            raise InputError(
                f"data {folder}: no captions; expected a .txt beside each image, or a metadata.jsonl of "
                f'{{"file_name": ..., "{config.caption_key}": ...}} lines'
            )
        for what, place in folders.items():
            self._match(what, place)
        self._note_unused(files, tables, folders.values())
        named = [p for r in self.rows for p in (r.image, r.condition, r.mask) if p is not None]
        rows = (f"{r.name} {r.caption} {r.error}" for r in self.rows)
        self.fingerprint = digest(*map(stat_line, named), *rows)

    @staticmethod
    def has_images(folder: Path) -> bool:
        """Return whether there is an image in the folder or below."""
        return any(
            p.suffix.lower() in IMAGES and not is_litter(p.relative_to(folder)) for p in folder.rglob("*")
        )

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        for i in range(part, len(self.rows), parts):
            row = self.rows[i]
            name = row.name
            try:
                if row.error:
                    raise InputError(row.error)
                image, condition, mask = (p and _read(p) for p in (row.image, row.condition, row.mask))
            except OSError as error:
                yield i, Sample(name, error=error.strerror or str(error))
            except InputError as error:
                yield i, Sample(name, error=str(error))
            else:
                yield i, Sample(name, image, row.caption, condition, mask)

    def _files(self, written: list[Path]) -> list[Path]:
        """Return the folder's files, without litter and what a run writes into it."""
        found = sorted(
            p for p in self.folder.rglob("*") if not is_litter(p.relative_to(self.folder)) and p.is_file()
        )
        inside = [path for path in written if self.folder.resolve() in path.parents]
        return [p for p in found if not _within(p, inside)]

    def _place(self, given: str) -> Path | str:
        """Return the folder that an option names, from here or within the data, or the name of a table's column."""
        for path in (expand(given), self.folder / given):
            if path.is_dir():
                return path
        return given

    def _rows(self, tables: list[Path], pictures: list[Path], columns: dict[str, str]) -> list[Row]:
        if columns and not tables:
            raise InputError(
                f"{next(iter(columns.values()))}: no such folder; expected one of files named as the images in "
                f"{self.folder}"
            )
        if twice := [p for p in tables if sum(other.parent == p.parent for other in tables) > 1]:
            raise InputError(f"{twice[0].parent}: {twice[0].name} and {twice[1].name}; expected one table")
        rows, named = [], set()
        for table in tables:
            rows += self._table_rows(table, columns, named)
        listed = {row.image for row in rows}
        for picture in (p for p in pictures if self.root in p.parents):
            apart = picture in named or CONDITIONS in picture.relative_to(self.root).parts[:-1]
            if picture in listed or apart:
                continue
            row = Row(str(picture.relative_to(self.folder)), picture)
            if not any(table.parent in picture.parents for table in tables):
                _add_text_beside(row)
            if columns:
                row.error = f"no {next(iter(columns))}: no table names the image"
            rows.append(row)
        return sorted(rows, key=lambda row: row.name)

    def _table_rows(self, table: Path, columns: dict[str, str], named: set[Path]) -> Iterator[Row]:
        """Yield the samples of a table that lie in the root. named: gets all files that its rows name."""
        key = self.config.caption_key
        kind = "JSON" if table.suffix == ".jsonl" else "a table"
        expected = f'{kind} with "file_name" and "{key}"'
        for place, fields in read_table(table, expected):
            image = _file_field(fields, self.config.image_key)
            if not isinstance(image, str):
                columns_of = (
                    "" if table.suffix == ".jsonl" else f"; its columns are {', '.join(map(repr, fields))}"
                )
                raise InputError(f"{table}: {place}: expected {expected}{columns_of}")
            files = {what: _file_field(fields, column) for what, column in columns.items()}
            if absent := [column for what, column in columns.items() if files[what] is None]:
                has = ", ".join(fields)
                raise InputError(f"{table}: {place}: no column {absent[0]!r}; it has {has}")
            others = (v for v in fields.values() if isinstance(v, str) and v.lower().endswith(IMAGES))
            for other in others:
                with suppress(InputError):
                    named.add(self._path(table, other))
            row = Row(image, caption=fields.get(column_named(key, fields)))
            try:
                row.image = self._path(table, image)
                row.name = str(row.image.relative_to(self.folder))
                paths = {what: self._path(table, name) for what, name in files.items()}
                row.condition, row.mask = (paths.get(what) for what in ("condition", "mask"))
            except InputError as error:
                row.error = str(error)
            if self.root == self.folder or row.image is None or self.root in row.image.parents:
                yield row

    def _path(self, table: Path, name: object) -> Path:
        """Return the file that a table names, by its place in the data.

        Raises InputError where it is not there, or its name leads out of the data; links in the data are followed.
        """
        path = inside(self.folder, table.parent, str(name))
        if path is None:
            raise InputError(f"{table.name} names {name}, which is not in the data's folder")
        try:
            found = os.path.isfile(path)
        except ValueError:  # a name that no file can have
            found = False
        if not found or not isinstance(name, str):
            shown = name if isinstance(name, str) and name.isprintable() else repr(name)
            raise InputError(f"{table.name} names {shown}: no such file")
        return self.folder / os.path.relpath(path, self.folder)

    def _match(self, what: str, folder: Path) -> None:
        """Give every row the file of its image's name in the folder, whatever its ending."""
        found = {
            p.relative_to(folder).with_suffix(""): p
            for p in sorted(folder.rglob("*"))
            if p.suffix.lower() in IMAGES and not is_litter(p.relative_to(folder))
        }
        rows = [row for row in self.rows if row.error is None]
        absent = []
        for row in rows:
            name = row.image.relative_to(self.folder).with_suffix("")
            inner = row.image.relative_to(self.root).with_suffix("")
            tried = (name, inner, *(Path(*n.parts[1:]) for n in (name, inner) if n.parts[0] == "images"))
            path = next((found[n] for n in tried if n in found), None)
            setattr(row, what, path)
            if path is None:
                absent.append(str(name))
        if absent:
            listed = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
            raise InputError(f"{what}s in {folder}: {len(absent)} of {len(rows)} images have none: {listed}")

    def _note_unused(self, files: list[Path], tables: list[Path], folders) -> None:
        used = {p for row in self.rows for p in (row.image, row.condition, row.mask, row.text)} | set(tables)
        for parent in sorted({row.image.parent for row in self.rows if row.image} - {self.folder}):
            if re.match(r"\d+_", parent.name):
                name = parent.relative_to(self.folder)
                self.unused.append(f"{name}/: the repeats in its name (kohya's); each image counts once")
        for path in files:
            if path in used or _within(path, folders):
                continue
            name, suffix = str(path.relative_to(self.folder)), path.suffix.lower()
            if self.root not in path.parents:
                self.unused.append(f"{name}: not in {self.root.name}/")
            elif suffix in IMAGES:
                self.unused.append(
                    f"{name}: a condition or mask that no option names (--condition-from, --mask-from)"
                )
            else:
                self.unused.append(f"{name}: no image, caption or table that is read here")


def _file_field(fields: dict, column: str) -> object:
    """Return a row's file of a column: also as `datasets` spells it, with "_file_name"; None where there is none."""
    names = (column, f"{column}_file_name", column_named(column, fields))
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    return value.get("path") if isinstance(value, dict) else value


def _add_text_beside(row: Row) -> None:
    for text in (row.image.with_suffix(e) for ending in TEXTS for e in (ending, ending.upper())):
        try:
            if text.is_file():
                row.text, row.caption = text, decode_text(_read(text)).strip()
                return
        except OSError as error:
            row.error = f"{text.name}: {error.strerror or error}"
        except InputError as error:
            row.error = f"{text.name}: {error}"


def _read(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_FILE:
        raise InputError(
            f"{path.name}: {path.stat().st_size / 2**20:,.0f} MiB; expected at most {LARGEST_FILE >> 20}"
        )
    return path.read_bytes()


def _within(path: Path, folders) -> bool:
    return any(folder.resolve() in path.resolve().parents for folder in folders)
