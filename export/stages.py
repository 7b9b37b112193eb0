"""The work folder of a build: which of its stages are whole, and the folder's name once all are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from runtime.engines.manifest import NAME, file_entry
from runtime.errors import InputError
from runtime.machine.files import replacing, sync
from runtime.machine.lock import locked

STATE, LOCK = "stages.json", "lock"


class Stages:
    """`.<name>.part` beside the folder that is built. Used by one process at a time."""

    def __init__(self, folder: Path, settings: Mapping[str, object], resume: bool):
        """Raises InputError where another build is at it, or `resume` finds a build of other settings."""
        folder = folder.resolve()
        self.work = folder.with_name(f".{folder.name}.part")
        text = json.dumps(settings, sort_keys=True, default=str)
        self.state = {"settings": hashlib.sha256(text.encode()).hexdigest(), "stages": {}}
        self._held = ExitStack()
        self._resume = resume
        self._checked: set[str] = set()  # the stages whose files were hashed

    def __enter__(self) -> Stages:
        self._check_own()
        try:
            self.work.mkdir(exist_ok=True)
            self._held.enter_context(locked(self.work / LOCK, f"--out: another build is writing {self.work}"))
        except OSError as error:
            raise InputError(f"--out: cannot write {self.work}: {error.strerror}") from error
        found = self._read()
        if not self._resume:
            self._clear()
        elif found is not None and found["settings"] != self.state["settings"]:
            self._held.close()
            raise InputError(
                f"--resume: {self.work} is of a build with other options; expected the same command"
            )
        elif found is not None:
            self.state = found
        return self

    def __exit__(self, *_) -> None:
        if not self.state["stages"]:  # nothing to go on with
            shutil.rmtree(self.work, ignore_errors=True)
        self._held.close()

    def done(self, name: str) -> dict | None:
        """Return what a stage left, where it is whole and its files are as it wrote them."""
        stage = self.state["stages"].get(name)
        if stage is None:
            return None
        for file, entry in stage["files"].items():
            path = self.work / file
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return None
            if name not in self._checked and file_entry(path) != entry:
                return None
        self._checked.add(name)
        return stage["data"]

    def finish(self, name: str, data: dict, files: list[Path], cost: Mapping[str, float]) -> None:
        """Note that a stage is whole: its files, what later ones need of it, and what it took."""
        for path in files:
            sync(path)
        entries = {str(path.relative_to(self.work)): file_entry(path) for path in files}
        self.state["stages"][name] = {"data": data, "files": entries, "cost": dict(cost)}
        self._checked.add(name)
        with replacing(self.work / STATE) as partial:
            partial.write_text(json.dumps(self.state, indent=1), "utf-8")

    def files(self) -> dict[str, dict]:
        """Return size and hash of every file of the finished stages."""
        return {
            file: entry for stage in self.state["stages"].values() for file, entry in stage["files"].items()
        }

    def costs(self) -> dict[str, dict]:
        """Return what every finished stage took: seconds, peak_bytes of memory, bytes written."""
        return {
            name: {**stage["cost"], "bytes": sum(entry["bytes"] for entry in stage["files"].values())}
            for name, stage in self.state["stages"].items()
        }

    def publish(self, folder: Path, keep: list[str]) -> None:
        """Give the work folder its name, with the files to keep and the manifest; another one there is replaced."""
        kept = {self.work / file for file in (*keep, NAME, LOCK)}
        for path in sorted(self.work.rglob("*"), reverse=True):
            if path.is_file() and path not in kept:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        folder, old = folder.resolve(), self.work.with_name(f"{self.work.name}.old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a build that was killed right here
            os.replace(folder, old)
        os.replace(self.work, folder)
        (folder / LOCK).unlink()  # the last of all: until now no other build could begin
        shutil.rmtree(old, ignore_errors=True)

    def _check_own(self) -> None:
        """Raise InputError where something of this name is not a build's: its content would be removed."""
        if self.work.is_symlink() or (self.work.exists() and not self.work.is_dir()):
            raise InputError(f"--out: {self.work} is not a build's folder; remove it, or build elsewhere")
        if self.work.is_dir() and any(self.work.iterdir()) and not (self.work / LOCK).is_file():
            raise InputError(
                f"--out: {self.work} is not of a build, and would be emptied; remove it, or build elsewhere"
            )

    def _read(self) -> dict | None:
        try:
            found = json.loads((self.work / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and set(found) == set(self.state) else None

    def _clear(self) -> None:
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
