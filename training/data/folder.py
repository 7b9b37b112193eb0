"""Training samples of a folder of images, in the layouts of Hugging Face, kohya and diffusers' examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError
from runtime.machine.files import expand
from training.config import TrainConfig
from training.data.cache import digest
from training.data.sample import IMAGES, LARGEST_FILE, Sample, column_named, decode_text, is_litter
from training.data.tables import is_table, read_table

TEXTS = (".txt", ".caption")  # beside an image
CONDITIONS = "conditioning_images"  # diffusers' examples: a folder beside "images"


@dataclass
class Row:
    """One sample's files. error: why it cannot be used."""

    image: Path
    caption: str | None = None
    condition: Path | None = None
    mask: Path | None = None
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
        files = self._files(expand(config.out).resolve())
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
        self.fingerprint = digest(*map(_stat, named), *(str(r.caption) for r in self.rows), *self.unused)

    @staticmethod
    def has_images(folder: Path) -> bool:
        """Return whether there is an image in the folder or below."""
        return any(
            p.suffix.lower() in IMAGES and not is_litter(p.relative_to(folder)) for p in folder.rglob("*")
        )

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, Sample]]:
        for i in range(part, len(self.rows), parts):
            row = self.rows[i]
            name = str(row.image.relative_to(self.folder))
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

    def _files(self, out: Path) -> list[Path]:
        """Return the folder's files, without litter and what a run in it draws."""
        found = sorted(
            p for p in self.folder.rglob("*") if not is_litter(p.relative_to(self.folder)) and p.is_file()
        )
        inside = self.folder.resolve() in out.parents
        return [p for p in found if not (inside and out in p.resolve().parents)]

    def _place(self, given: str) -> Path | str:
        """Return the folder that an option names, from here or within the data, or the name of a table's column."""
        for path in (expand(given), self.folder / given):
            if path.is_dir():
                return path
        return given

    def _rows(self, tables: list[Path], pictures: list[Path], columns: dict[str, str]) -> list[Row]:
        rows, named = [], set()
        for table in tables:
            rows += self._table_rows(table, columns, named)
        listed = {row.image for row in rows}
        within = [p for p in pictures if self.root in p.parents]
        for picture in within:
            apart = picture in named or CONDITIONS in picture.relative_to(self.root).parts[:-1]
            if picture not in listed and not apart:
                covered = any(table.parent in picture.parents for table in tables)
                rows.append(Row(picture) if covered else _with_text_beside(picture))
        if columns and not tables:
            raise InputError(
                f"{next(iter(columns.values()))}: no such folder; expected one of files named as the images in "
                f"{self.folder}"
            )
        return sorted(rows, key=lambda row: row.image)

    def _table_rows(self, table: Path, columns: dict[str, str], named: set[Path]) -> Iterator[Row]:
        """Yield the samples of a table that lie in the root. named: gets all files that its rows name."""
        key = self.config.caption_key
        expected = f'JSON with "file_name" and "{key}"'
        for place, fields in read_table(table, expected):
            image = _file_field(fields, self.config.image_key)
            if not isinstance(image, str):
                raise InputError(f"{table}: {place}: expected {expected}")
            files = {what: _file_field(fields, column) for what, column in columns.items()}
            if absent := [column for what, column in columns.items() if files[what] is None]:
                has = ", ".join(fields)
                raise InputError(f"{table}: {place}: no column {absent[0]!r}; it has {has}")
            paths = {what: self._path(table, name) for what, name in {"image": image, **files}.items()}
            others = (v for v in fields.values() if isinstance(v, str) and v.lower().endswith(IMAGES))
            named.update(self._path(table, v)[0] for v in others)
            named.update(path for path, _ in paths.values())
            row = Row(paths["image"][0], fields.get(column_named(key, fields)))
            row.error = next((error for _, error in paths.values() if error), None)
            row.condition, row.mask = (paths.get(what, (None,))[0] for what in ("condition", "mask"))
            if self.root == self.folder or self.root in row.image.parents:
                yield row

    def _path(self, table: Path, name: str) -> tuple[Path, str | None]:
        """Return the file that a table names, and what is wrong with it."""
        path = table.parent / name
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                return self.folder / Path(
                    name
                ).name, f"{table.name} names {name}, which is not in the data's folder"
            return path, None if path.is_file() else f"{table.name} names {name}: no such file"
        except (OSError, ValueError):  # a name that no file can have
            return self.folder / "?", f"{table.name} names {name!r}: no such file"

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
        used = {p for row in self.rows for p in (row.image, row.condition, row.mask)} | set(tables)
        for parent in sorted({row.image.parent for row in self.rows} - {self.folder}):
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
            elif (
                suffix in TEXTS and any(path.with_suffix(e) in used for e in _any_case(IMAGES)) and not tables
            ):
                continue
            else:
                self.unused.append(f"{name}: no image, caption or table that is read here")


def _file_field(fields: dict, column: str) -> object:
    """Return a row's file of a column: also as `datasets` spells it, with "_file_name"; None where there is none."""
    names = (column, f"{column}_file_name", column_named(column, fields))
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    return value.get("path") if isinstance(value, dict) else value


def _with_text_beside(image: Path) -> Row:
    for text in (image.with_suffix(ending) for ending in TEXTS):
        try:
            if text.is_file():
                return Row(image, decode_text(_read(text)).strip())
        except OSError as error:
            return Row(image, error=f"{text.name}: {error.strerror or error}")
        except InputError as error:
            return Row(image, error=f"{text.name}: {error}")
    return Row(image)


def _read(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_FILE:
        raise InputError(
            f"{path.name}: {path.stat().st_size / 2**20:,.0f} MiB; expected at most {LARGEST_FILE >> 20}"
        )
    return path.read_bytes()


def _within(path: Path, folders) -> bool:
    return any(folder.resolve() in path.resolve().parents for folder in folders)


def _any_case(endings: tuple[str, ...]) -> tuple[str, ...]:
    return (*endings, *(ending.upper() for ending in endings))


def _stat(path: Path) -> str:
    try:
        s = path.stat()
    except OSError:
        return f"{path} gone"
    # the time of the change of status cannot be set back, as the other can
    return f"{path} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
