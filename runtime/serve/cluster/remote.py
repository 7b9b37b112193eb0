"""What stands for the engine where requests are taken: it sends them to replicas, and tells what becomes of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import secrets
import threading
import time
from contextvars import Context
from functools import partial
from typing import Any

from ray import exceptions as lost
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from runtime.serve.admission import check_room, end_of, replace_older
from runtime.serve.limits import Limits
from runtime.serve.pictures import Hearer
from runtime.serve.refusals import Refusal
from runtime.serve.work import Work

log = logging.getLogger("runtime.serve")
LAST = ("done", "failed", "cancelled")  # these are of the work; "interrupted" is of the replica
# What a call ends in whose replica has died, or its node; or that nobody here has cancelled
LOST = (
    lost.RayActorError, lost.NodeDiedError, lost.WorkerCrashedError, lost.OutOfMemoryError, lost.ObjectLostError,
    lost.RpcError, lost.TaskCancelledError, DeploymentUnavailableError, asyncio.CancelledError,
)  # fmt: skip


class Interrupted(Exception):
    """A replica has ended before the work that it had."""


class RemoteEngine:
    """Replicas in the engine's place. A work whose replica dies is sent once more: same seed, same picture."""

    warm = True  # replicas are, before they are sent anything

    def __init__(self, replicas: DeploymentHandle, limits: Limits, hearer: Hearer):
        self.replicas, self.limits, self.hearer = replicas.options(stream=True), limits, hearer
        self.draining = False
        self._open: dict[Work, concurrent.futures.Future] = {}
        self._lock = threading.Lock()  # of what is added to it and taken from it
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin; called on the event loop that the calls to replicas run on."""
        self._loop = asyncio.get_running_loop()

    @property
    def alive(self) -> bool:
        return self._loop is not None and not self._loop.is_closed()

    @property
    def beat(self) -> float:
        """Return when it was last seen: it has no thread that could hang."""
        return time.monotonic()

    @property
    def depth(self) -> int:
        """Return how many requests wait for their first step."""
        return len(self._waiting())

    def _waiting(self) -> list[Work]:
        return [work for work in list(self._open) if work.started is None]

    def submit(self, work: Work, keyed: bool = False) -> None:
        """Send a request, from any thread. Raises Refusal where too many wait already."""
        if self.draining:
            raise Refusal(503, "server: it is ending; send the request again", retry_after=5)
        if work.order.request.seed is None:
            work.order.request.seed = secrets.randbelow(2**32)
        with self._lock:
            check_room(self._waiting(), work, self.limits, keyed)
            replace_older(list(self._open), work)
            work.events.publish("queued", position=self.depth)
            # In no request's context: Ray would end what a request has begun with that request.
            sent = Context().run(asyncio.run_coroutine_threadsafe, self._draw(work), self._loop)
            self._open[work] = sent
        sent.add_done_callback(partial(_noted, work))
        self.wake()

    def wake(self) -> None:
        """End what was stopped, from any thread."""
        for work, sent in list(self._open.items()):
            if work.stopped:
                sent.cancel()

    def drain(self) -> None:
        """Take no more; those that wait end at once, those that run go on."""
        self.draining = True
        for work in self._waiting():
            work.stop("interrupted", "server: it is ending; send the request again")
        self.wake()

    def stop(self, seconds: float = 5.0) -> None:
        """End all that runs; wait for it for so long."""
        self.drain()
        for work in list(self._open):
            work.stop("interrupted", "server: it has ended; send the request again")
        self.wake()
        until = time.monotonic() + seconds
        while self._open and time.monotonic() < until:
            time.sleep(0.01)

    def close(self) -> None:
        self.stop(1.0)

    async def _draw(self, work: Work) -> None:
        """Have a work drawn, and tell its end."""
        try:
            for last in (False, True):
                try:
                    await self._follow(work)
                    return
                except (Interrupted, *LOST) as error:
                    if work.stopped:
                        self.hearer.ended(work, *end_of(work))
                        return
                    log.warning("request %s: its replica was lost: %s", work.id, type(error).__name__)
                    if last:
                        why = "server: its replicas were lost; send the request again"
                        self.hearer.ended(work, "interrupted", Refusal(503, why, retry_after=5))
                        return
                    work.started, work.steps_done = None, 0  # it waits again
        except BackPressureError:
            why = "queue: the replicas are busy; send it again later"
            self.hearer.ended(work, "failed", Refusal(429, why, retry_after=2))
        except Exception as error:
            log.error("request %s", work.id, exc_info=error)
            why = f"server: {type(error).__name__}; its log says more"
            self.hearer.ended(work, "failed", Refusal(500, why))
        finally:
            with self._lock:
                self._open.pop(work, None)

    def _too_late(self, work: Work) -> None:
        if work.started is None:
            work.stop("failed", f"queue: it waited for more than {self.limits.queued_seconds:g} s")
            self.wake()

    async def _follow(self, work: Work) -> None:
        """Send a work to a replica, and tell what comes of it. Raises Interrupted, or one of LOST."""
        late = self._loop.call_later(self.limits.queued_seconds, self._too_late, work)
        events, ended = self.replicas.draw.remote(work.order, work.id, work.previews, work.followed), False
        try:
            async for kind, data in events:
                ended = kind in LAST
                self._tell(work, kind, data)
                if ended:  # whatever becomes of the stream
                    return
            raise Interrupted
        finally:
            late.cancel()
            if not ended:
                events.cancel()

    def _tell(self, work: Work, kind: str, data: dict[str, Any]) -> None:
        if kind == "started":
            work.started = time.monotonic()
            self.hearer.started(work)
        elif kind == "step":
            work.steps_done = data["step"]
            self.hearer.stepped(work, **data)
        elif kind == "preview":
            self.hearer.previewed(work, **data)
        elif kind == "done":
            self.hearer.finished(work, **data)
        elif kind in LAST:
            self.hearer.ended(work, kind, data["error"])
        elif kind == "interrupted":
            raise Interrupted


def _noted(work: Work, sent: concurrent.futures.Future) -> None:
    """Log what nobody would hear of."""
    if not sent.cancelled() and (error := sent.exception()) is not None:
        log.error("request %s", work.id, exc_info=error)
