"""An interrupt in one line, imported by commands before the seconds that their imports take."""

from __future__ import annotations

import os
import signal
import sys
import threading

CANCELLED = 130  # the shell's exit code after Ctrl-C

_before = sys.excepthook
_pressed = threading.Event()
_shown = threading.Event()


def _note(number, frame) -> None:
    _pressed.set()
    _shown.clear()
    signal.default_int_handler(number, frame)


def taken() -> bool:
    """Say whether there was an interrupt since this was last asked."""
    was = _pressed.is_set()
    _pressed.clear()
    return was


def shown() -> bool:
    """Say whether the interrupt was told of already: an extension that is imported may print it and go on."""
    was = _shown.is_set()
    _shown.clear()
    return was


def _show(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        _shown.set()
    elif taken():
        # what a half-imported module makes of it: an ImportError, a SystemError, an endless recursion
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(CANCELLED)
    else:
        _before(kind, error, trace)


sys.excepthook = _show
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _note)
