"""A replica: the model and its engine, in a process of its own, that draws what is sent to it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from runtime.cli.load import load
from runtime.serve.admission import most_rows
from runtime.serve.engine import Engine
from runtime.serve.identity import Served, model_hash
from runtime.serve.limits import Limits
from runtime.serve.log import log_lines
from runtime.serve.orders import Order
from runtime.serve.pictures import Encoder
from runtime.serve.refusals import Refusal
from runtime.serve.work import DISCONNECTED, Work

EVERY = 0.1  # seconds between two steps of a work that its caller hears of
MANY = 10**9  # what waits is bounded where it comes in


class Replica:
    """Draws orders. It hears of its engine's works, and tells of each to whoever has sent it."""

    leave = staticmethod(os._exit)  # end this process

    def __init__(self, options: argparse.Namespace, limits: Limits):
        """Load the model that the options say, and warm it up."""
        log_lines()
        pipe = load(options)
        rows = limits.rows or most_rows(pipe)
        self.served, self.limits = Served.of(pipe, model_hash(options), rows), limits
        bounds = replace(limits, rows=rows, queue=MANY, queue_per_key=MANY, queue_mib=MANY)
        self.engine = Engine(pipe, bounds, Encoder(pipe, options, self))
        self.engine.start()
        while not self.engine.warm:
            if not self.engine.alive:
                raise RuntimeError("the engine's thread has ended while it was warming up")
            time.sleep(0.02)

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()

    def check_health(self) -> None:
        """Raise RuntimeError where the engine's thread has ended, or hangs: Ray then makes another replica."""
        if not self.engine.alive:
            raise RuntimeError("the engine's thread has ended")
        if time.monotonic() - self.engine.beat > self.limits.running_seconds:
            raise RuntimeError(f"the engine's thread hangs: no step for {self.limits.running_seconds:g} s")

    async def describe(self) -> Served:
        """Return what it serves."""
        return self.served

    async def draw(
        self, order: Order, id: str, previews: bool, followed: bool
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Yield the kind of each event, and what it says; the last one has the PNGs or the error.

        followed: whether anybody wants its steps. Each costs milliseconds on its way to the caller, who therefore
        hears of one now and then. Where its caller goes away, the work ends before its next step.
        """
        work = Work(order, owner="", previews=previews, id=id)
        try:
            self.engine.submit(work)
        except Refusal as error:
            yield "interrupted", {"error": error}
            if not self.engine.alive:
                self.leave(1)  # it would be the least busy of all, and be sent everything
            return
        try:
            told = 0.0
            async for event in work.events.follow():
                if event is None or event.kind == "queued":
                    continue
                if event.kind == "step":
                    if not followed or time.monotonic() - told < EVERY:
                        continue
                    told = time.monotonic()
                yield event.kind, event.data
        finally:
            if work.stop("cancelled", DISCONNECTED):
                self.engine.wake()

    # What it hears: see `pictures.Hearer`

    def started(self, work: Work) -> None:
        work.events.publish("started")

    def stepped(self, work: Work, step: int, steps: int) -> None:
        work.events.publish("step", step=step, steps=steps)

    def previewed(self, work: Work, step: int, steps: int, images: list[str]) -> None:
        work.events.publish("preview", step=step, steps=steps, images=images)

    def finished(self, work: Work, pictures: list[bytes], result: dict[str, Any]) -> None:
        work.events.publish("done", pictures=pictures, result=result)

    def ended(self, work: Work, state: str, error: Refusal) -> None:
        work.events.publish(state, error=error)

    def ticked(self, rows: int, seconds: float) -> None: ...
