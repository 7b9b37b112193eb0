"""Tensors computed once: a store of rows under keys, kept in shards that are named by the hash of what is in them.

A shard is a safetensors file `<sha256 of the file>.safetensors` with rows "key/name". So a torn or edited file is told
from a good one by its name alone, writers need not agree on numbers, and a row that exists is never computed again. A
store's folder is named by the hash of its settings, which lie in it as settings.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime.errors import InputError
from runtime.machine.files import read_json, replacing, sha256

SHARD_BYTES = 128 * 2**20
FORMAT = 1  # raised when what a row holds changes

Row = dict[str, Tensor]


def digest(*parts: bytes | str) -> str:
    """32 hex digits of the parts' SHA-256, each with its length, so that no two lists of parts run together."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:32]


class Store:
    """Rows of named tensors under keys, in `folder/<kind>-<hash of the settings>`.

    Read by any number of processes; one process may add to it, or several as long as they add different keys, and
    `refresh` shows what others have added. Opening it reads and checks every shard; bad ones are removed, so that
    their rows count as missing (`discarded` says how many).
    """

    def __init__(self, folder: Path, kind: str, settings: Mapping[str, object]):
        self.kind, self.settings = kind, {"format": FORMAT, **settings}
        text = json.dumps(self.settings, sort_keys=True)
        self.folder = folder / f"{kind}-{digest(text)[:12]}"
        self.discarded = 0
        self._where: dict[str, tuple[Path, list[str]]] = {}
        self._open: dict[Path, safe_open] = {}
        self._new: dict[str, Row] = {}
        self._new_bytes = 0
        self._checked: set[Path] = set()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._where or key in self._new

    def __len__(self) -> int:
        return len(self._where.keys() | self._new.keys())

    def __getstate__(self):
        """Make ready for a worker process: open files are its own."""
        return {**self.__dict__, "_open": {}}

    def refresh(self) -> None:
        """See the shards that are on the disk now; each is checked once."""
        paths = [p for p in sorted(self.folder.glob("*.safetensors")) if p not in self._checked]
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            for path, rows in zip(paths, pool.map(_checked_rows, paths), strict=True):
                if rows is None:
                    path.unlink(missing_ok=True)
                    self.discarded += 1
                else:
                    self._checked.add(path)
                    self._where.update((key, (path, names)) for key, names in rows.items())

    def get(self, key: str) -> Row:
        """Return a copy of a row. Raises KeyError where there is none."""
        if key in self._new:
            return dict(self._new[key])
        path, names = self._where[key]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return {name: self._open[path].get_tensor(f"{key}/{name}") for name in names}

    def add(self, key: str, row: Row) -> None:
        """Keep a row. It is on the disk after the next `flush`, which comes by itself every SHARD_BYTES."""
        self.add_all({key: row})

    def add_all(self, rows: Mapping[str, Row]) -> None:
        """Keep rows that were computed together: all of them are in one shard, so that none is ever missing alone.

        What is computed in other company has other last bits.
        """
        for key, row in rows.items():
            self._new[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in row.items()}
            self._new_bytes += sum(t.numel() * t.itemsize for t in row.values())
        if self._new_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added. Raises InputError where the disk does not take it."""
        if not self._new:
            return
        tensors = {f"{key}/{name}": t for key, row in self._new.items() for name, t in row.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_settings()
            data = save(tensors)
            path = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
            with replacing(path) as partial:
                partial.write_bytes(data)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cache: cannot write to {self.folder}: {error}") from error
        self._checked.add(path)
        self._where.update((key, (path, list(row))) for key, row in self._new.items())
        self._new, self._new_bytes = {}, 0

    def others(self) -> list[str]:
        """Return how stores of this kind with other settings in the same folder differ: a line for each."""
        lines = []
        for path in sorted(self.folder.parent.glob(f"{self.kind}-*/settings.json")):
            if path.parent != self.folder:
                theirs = read_json(path)
                names = sorted(
                    n for n in theirs.keys() | self.settings if theirs.get(n) != self.settings.get(n)
                )
                said = (f"{n} {theirs.get(n)!r}, now {self.settings.get(n)!r}" for n in names)
                lines.append(f"{path.parent.name}: {', '.join(said)}")
        return lines

    def _write_settings(self) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            with replacing(path) as partial:
                partial.write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _checked_rows(path: Path) -> dict[str, list[str]] | None:
    """Return a shard's keys and the names of each one's tensors; None where the file is not what its name says.

    Raises OSError where the disk does not give it now: what it holds may be good.
    """
    try:
        if sha256(path) != path.stem:
            return None
        rows: dict[str, list[str]] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                key, _, tensor = name.rpartition("/")
                rows.setdefault(key, []).append(tensor)
        return rows
    except (FileNotFoundError, SafetensorError):
        return None
