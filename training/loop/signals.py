"""Stopping a run: SIGTERM and SIGINT end it after the step at hand, a second one at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether a run was asked to stop: `signal` is the signal's number, 0 for not yet."""

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals in this block, and put back what took them before."""

        def note(number: int, _) -> None:
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
