"""The folder that a build writes: whether it can be made or replaced, and whether there is room for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from export.stages import LOCK, Stages
from export.targets.compile import MEMORY
from runtime.engines import verified
from runtime.engines.manifest import NAME
from runtime.errors import InputError
from runtime.machine.files import read_json, size_of


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise InputError unless the folder can be made, or is one of engines that may be replaced."""
    parent = folder.resolve().parent
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder}: a file of that name is there; expected a folder")
        if folder.exists() and any(folder.iterdir()):
            if not overwrite:
                raise InputError(f"--out {folder}: not empty; expected a new folder, or --overwrite")
            if not (folder / NAME).is_file():
                raise InputError(
                    f"--out {folder}: no folder of engines (no {NAME}), so it is not overwritten"
                )
            _check_ours(folder)
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot make {parent}: {error.strerror}") from error
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {folder}: {parent} is not writable")


def _check_ours(folder: Path) -> None:
    """Raise InputError, naming it, where a file in the folder is neither the build's nor a comparison's."""
    try:
        listed = set(read_json(folder / NAME)["files"])
    except (KeyError, TypeError) as error:
        raise InputError(f"--out {folder}: its {NAME} lists no files, so it is not overwritten") from error
    ours = listed | {NAME, verified.FILE, LOCK}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        if name not in ours and not (path.name.startswith(".") and path.suffix == ".part"):
            raise InputError(
                f"--out {folder}: has {name}, which is no part of the engines; move it, so that it is not deleted"
            )


def check_room(
    target: str, sizes: Mapping[str, int], stages: Stages, force: bool, say: Callable[[str], None]
) -> None:
    """Say how much disk and memory a build takes; InputError where they are not there. sizes: bytes of each graph."""
    copies = 1 if target == "onnxruntime" else 2
    there = sum(entry["bytes"] for entry in stages.files().values())  # of a build that goes on
    disk = max(0, int(1.02 * copies * sum(sizes.values())) + 2**26 - there)
    factor, extra = MEMORY[target]
    memory = int(factor * max(sizes.values())) + extra
    # the model's own memory is free again by then
    free = psutil.virtual_memory().available + sum(sizes.values())
    room = shutil.disk_usage(stages.work).free
    say(f"about {size_of(disk)} on disk and {size_of(memory)} of memory are needed")
    for what, needed, left in (("disk", disk, room), ("memory", memory, free)):
        if needed > left and not force:
            raise InputError(
                f"--out {stages.work.parent}: about {size_of(needed)} of {what} needed, {size_of(left)} "
                "free; free some, take a smaller precision, or --force"
            )
