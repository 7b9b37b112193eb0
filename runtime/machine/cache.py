"""The folder of what this program keeps on a machine."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import InputError, first_line
from runtime.machine.files import expand


def cache_folder(create: bool = True) -> Path:
    """Return the folder of what was measured, and of a server's files and jobs.

    Raises InputError where LOCALCONTROL_CACHE names none.
    """
    folder = os.environ.get("LOCALCONTROL_CACHE", "~/.cache/localcontrol")
    path = expand(folder, "LOCALCONTROL_CACHE")
    try:
        if create:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"LOCALCONTROL_CACHE {folder}: {first_line(error)}; expected a folder") from error
    return path
