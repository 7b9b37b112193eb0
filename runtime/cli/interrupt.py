"""An interrupt in one line, imported by commands before the seconds that their imports take."""

from __future__ import annotations

import sys

_before = sys.excepthook


def _show(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        _before(kind, error, trace)


sys.excepthook = _show
