"""Silence for diffusers and transformers while they load: what they would warn of is checked, and is an error."""

import contextlib
import logging
import threading
from collections.abc import Iterator

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

_loading = threading.RLock()  # the settings are the process's: one thread loads at a time, and puts them back


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Turn off both libraries' messages and, unless `bars`, their progress bars and those of downloads."""
    with _loading:
        yield from _quiet(bars)


def _quiet(bars: bool) -> Iterator[None]:
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        if not bars:
            library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, enabled) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if enabled and not bars:
                library.enable_progress_bar()
