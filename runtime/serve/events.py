"""What happens to a request, told from the engine's thread to any number of connections."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

LAST = ("done", "failed", "cancelled", "interrupted")  # after one of these comes no other
KEEPALIVE = 15.0  # seconds without an event after which a connection is shown to be alive


@dataclass(frozen=True)
class Event:
    """One event: its number from 1, its kind, and what it says."""

    number: int
    kind: str
    data: dict[str, Any]


class Events:
    """A request's events, kept to be read again from any of them on; of previews only the newest."""

    def __init__(self) -> None:
        self._name = secrets.token_hex(4)  # other than that of a job's events before it was sent again
        self._events: list[Event] = []
        self._count = 0
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

    def id_of(self, event: Event) -> str:
        """Return what names an event of these, and none of others."""
        return f"{self._name}-{event.number}"

    def number_of(self, id: str) -> int:
        """Return the number of the event that is so named; 0, before the first, where it is none of these."""
        name, _, number = id.partition("-")
        return int(number) if name == self._name and number.isdecimal() else 0

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
