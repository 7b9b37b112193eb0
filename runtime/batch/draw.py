"""The loop: requests in, pictures out, by the server's row scheduler without its server."""

from __future__ import annotations

import argparse
import hashlib
import queue
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.batch.orders import LIMITS, Ordered
from runtime.batch.requests import Line
from runtime.batch.results import Results, Row
from runtime.cli.command import say
from runtime.pipeline import LocalControlPipeline
from runtime.serve.engine import Engine
from runtime.serve.orders import Order
from runtime.serve.pictures import Encoder
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Generate
from runtime.serve.work import Work

AHEAD = 2  # times the rows of a step: requests whose pictures are decoded before there is room for them


@dataclass(frozen=True)
class Picture:
    """What a worker hands back: a PNG with its seed and seconds, or the error; and what was warned of."""

    id: str
    source: str
    png: bytes | None = None
    seed: int | None = None
    seconds: float | None = None
    error: Refusal | None = None
    warnings: Sequence[str] = ()

    def warn(self) -> None:
        """Say its warnings."""
        for warning in self.warnings:
            say(f"warning: {self.source}: {warning}")


class Drawer:
    """An engine for any number of turns, each on its own thread. It hears of the engine's works."""

    def __init__(self, pipe: LocalControlPipeline, options: argparse.Namespace, rows: int = 0):
        self.encoder = Encoder(pipe, options, self)
        self.engine = Engine(pipe, replace(LIMITS, rows=rows), self.encoder)
        self.turns: dict[Work, tuple[Turn, str]] = {}  # with the request's source
        self.engine.start()

    def __enter__(self) -> Drawer:
        return self

    def __exit__(self, *_) -> None:
        self.engine.stop()
        self.encoder.close()

    def started(self, work: Work) -> None: ...
    def stepped(self, work: Work, step: int, steps: int) -> None: ...
    def previewed(self, work: Work, step: int, steps: int, images: list[str]) -> None: ...
    def ticked(self, rows: int, seconds: float) -> None: ...

    def finished(self, work: Work, pictures: list[bytes], result: dict[str, Any]) -> None:
        seconds = round(result["timings"]["running"], 4)
        self._hand_out(work, png=pictures[0], seed=result["seed"], seconds=seconds)

    def ended(self, work: Work, state: str, error: Refusal | None) -> None:
        self._hand_out(work, error=error or Refusal(500, state))

    def _hand_out(self, work: Work, **found) -> None:
        turn, source = self.turns.pop(work)
        turn.done.put(Picture(work.id, source, warnings=work.order.warnings, **found))


class Turn:
    """Some requests of a drawer, and their pictures as they are done. Several turns share the model's steps."""

    def __init__(self, drawer: Drawer):
        self.drawer = drawer
        self.done: queue.Queue[Picture] = queue.Queue()
        self._open = 0  # submitted, and not yet handed out

    @property
    def room(self) -> bool:
        """Return whether another request should be sent now."""
        return self._open < AHEAD * self.drawer.engine.rows

    @property
    def busy(self) -> bool:
        return self._open > 0

    def submit(self, id: str, source: str, order: Order) -> None:
        work = Work(order, owner="", id=id)
        self.drawer.turns[work] = self, source
        try:
            self.drawer.engine.submit(work)
        except Refusal as error:  # it is none of the request's: there is room, and nobody else
            raise RuntimeError(f"{error}; the log says why") from error
        self._open += 1

    def next(self) -> Picture:
        """Wait for a picture."""
        while True:
            try:
                picture = self.done.get(timeout=5.0)
                self._open -= 1
                return picture
            except queue.Empty:
                if not self.drawer.engine.alive:
                    raise RuntimeError("the engine's thread has ended; the log says why") from None


def draw(lines: Iterable[Line], drawer: Drawer, ordered: Ordered, results: Results) -> Iterator[str]:
    """Draw what is missing. Yields what became of each picture as it does: drawn, there, refused, failed."""
    turn = Turn(drawer)
    for found in missing(lines, ordered, results):
        if isinstance(found, str):
            yield found
            continue
        id, body, line = found
        try:
            order = ordered.order(body, line.base)
        except Refusal as error:
            yield refuse(line, error, results)
            continue
        while not turn.room:
            yield take(turn.next(), results)
        turn.submit(id, line.source, order)
    while turn.busy:
        yield take(turn.next(), results)


def missing(
    lines: Iterable[Line], ordered: Ordered, results: Results
) -> Iterator[tuple[str, Generate, Line] | str]:
    """Yield what is to be drawn: id, request, and the line it is from; or what became of a picture already."""
    asked: set[str] = set()
    for line in lines:
        try:
            for id, body in ordered.of(line):
                if id in asked or results.has(id, line.source):
                    yield "there"
                else:
                    asked.add(id)
                    yield id, body, line
        except Refusal as error:
            yield refuse(line, error, results)


def take(picture: Picture, results: Results) -> str:
    """Say and keep what a worker hands back."""
    picture.warn()
    if picture.png is not None:
        results.save(picture.id, picture.png, picture.seed, picture.seconds, picture.source)
        return "drawn"
    if results.known.get(picture.id) != str(picture.error):
        results.add(Row(picture.id, None, None, None, str(picture.error), picture.source))
    return "failed" if picture.error.status >= 500 else "refused"


def refuse(line: Line, error: Refusal, results: Results) -> str:
    """Note a bad request, once, by a hash of what it says."""
    id = hashlib.sha256(repr((line.source, line.body, line.error)).encode(errors="replace")).hexdigest()[:32]
    if not results.refused(id):
        results.add(Row(id, None, None, None, str(error), line.source))
    return "refused"
