"""One request on its way through the engine: what it asks, where it is, and what became of it."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from runtime.sampling.progress import Progress
from runtime.sampling.result import Result
from runtime.serve.events import Events
from runtime.serve.orders import Order
from runtime.serve.refusals import Refusal

DISCONNECTED, CANCELLED, REPLACED = (
    "the client has gone",
    "cancelled",
    "replaced by a newer one of its session",
)


@dataclass(eq=False)
class Work:
    """A request that waits, runs or has ended.

    owner: whose API key. session: a newer work of the same owner and session takes this one's place. previews: whether
    they are wanted; followed: whether its steps are. job: whether the store has it, by this id. created, started:
    seconds of time.monotonic(). pictures: PNGs, once it is done; result: seed, timings, and what is said of them.
    error: why there are none.
    """

    order: Order
    owner: str
    session: str | None = None
    previews: bool = False
    followed: bool = True
    job: bool = False
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    events: Events = field(default_factory=Events)
    pictures: list[bytes] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: Refusal | None = None
    steps_done: int = 0
    _stopped: tuple[str, str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self, state: str, why: str) -> bool:
        """Ask for its end before the next step, from any thread. Returns whether it was the first to ask."""
        with self._lock:
            first = self._stopped is None
            self._stopped = self._stopped or (state, why)
            return first

    @property
    def stopped(self) -> tuple[str, str] | None:
        """Return the state it is to end in, and why, where its end was asked for."""
        return self._stopped

    @property
    def rows(self) -> int:
        """Return the most rows of the UNet that a step of it takes."""
        return self.order.request.most_rows

    async def ended(self) -> None:
        """Wait for its end."""
        async for _ in self.events.follow():
            pass


@dataclass(frozen=True)
class Drawn:
    """What the engine hands over: the result, and seconds in the queue and at work."""

    result: Result
    queued: float
    running: float


class Watcher(Protocol):
    """What is told of the engine's doings, on its thread, or of an end where one submits: it must not take long."""

    def started(self, work: Work) -> None: ...
    def stepped(self, work: Work, progress: Progress) -> None: ...
    def drawn(self, work: Work, drawn: Drawn) -> None: ...
    def ended(self, work: Work, state: str, error: Refusal | None) -> None: ...
    def ticked(self, rows: int, seconds: float) -> None: ...
    def close(self) -> None: ...
