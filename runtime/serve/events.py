"""What happens to a request, told from the engine's thread to any number of connections."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

LAST = ("done", "failed", "cancelled", "interrupted")  # after one of these comes no other
KEEPALIVE = 15.0  # seconds without an event after which a connection is shown to be alive


@dataclass(frozen=True)
class Event:
    """One event: its number, mostly from 1, its kind, and what it says."""

    number: int
    kind: str
    data: dict[str, Any]


class Events:
    """A request's events, kept to be read again from any of them on; of previews only the newest."""

    def __init__(self, after: int = 0) -> None:
        """after: the number before their first: those of a job that is sent again go on from its earlier ones."""
        self._events: list[Event] = []
        self._count = after
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def publish(self, kind: str, **data: Any) -> None:
        """Add an event, from any thread; after one of LAST nothing is added."""
        with self._lock:
            if self._events and self._events[-1].kind in LAST:
                return
            if kind == "preview":
                self._events = [event for event in self._events if event.kind != "preview"]
            self._count += 1
            self._events.append(Event(self._count, kind, data))
            for loop, changed in self._waiting:
                with suppress(RuntimeError):  # a loop that was closed
                    loop.call_soon_threadsafe(changed.set)

    @property
    def last(self) -> Event | None:
        """Return the newest event."""
        with self._lock:
            return self._events[-1] if self._events else None

    async def follow(self, after: int = 0, keepalive: float = KEEPALIVE) -> AsyncIterator[Event | None]:
        """Yield the events with higher numbers, up to one of LAST; None where for a while there is none."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._waiting.add((loop, changed))
        try:
            while True:
                changed.clear()
                with self._lock:
                    new = [event for event in self._events if event.number > after]
                    ended = bool(self._events) and self._events[-1].kind in LAST
                for event in new:
                    after = event.number
                    yield event
                if ended:
                    return
                if not new:
                    try:
                        await asyncio.wait_for(changed.wait(), keepalive)
                    except asyncio.TimeoutError:
                        yield None
        finally:
            with self._lock:
                self._waiting.discard((loop, changed))
