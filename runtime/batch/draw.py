"""The loop: requests in, pictures out, by the server's row scheduler without its server."""

from __future__ import annotations

import argparse
import hashlib
import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from runtime.batch.orders import LIMITS, Ordered
from runtime.batch.requests import Line
from runtime.batch.results import Results, Row
from runtime.cli.command import say
from runtime.pipeline import LocalControlPipeline
from runtime.sampling.progress import Progress
from runtime.serve.engine import Engine
from runtime.serve.orders import Order
from runtime.serve.pictures import encoded
from runtime.serve.refusals import Refusal
from runtime.serve.work import Drawn, Work

AHEAD = 2  # times the rows of a step: requests whose pictures are decoded before there is room for them


@dataclass(frozen=True)
class Picture:
    """What a worker hands back: a PNG with its seed and seconds, or the error."""

    id: str
    source: str
    png: bytes | None = None
    seed: int = 0
    seconds: float = 0.0
    error: Refusal | None = None


class Drawer:
    """An engine whose pictures come out of a queue. It is the engine's watcher."""

    def __init__(self, pipe: LocalControlPipeline, options: argparse.Namespace, rows: int = 0):
        self.pipe, self.options = pipe, options
        self.engine = Engine(pipe, replace(LIMITS, rows=rows), self)
        self.done: queue.Queue[Picture] = queue.Queue()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="encode")
        self._names: dict[Work, tuple[str, str]] = {}
        self._open = 0  # submitted, and not yet handed out
        self.engine.start()

    def __enter__(self) -> Drawer:
        return self

    def __exit__(self, *_) -> None:
        self.engine.stop()
        self._pool.shutdown(cancel_futures=True)

    @property
    def room(self) -> bool:
        """Return whether another request should be sent now."""
        return self._open < AHEAD * self.engine.rows

    @property
    def busy(self) -> bool:
        return self._open > 0

    def submit(self, id: str, source: str, order: Order) -> None:
        work = Work(order, owner="", id=id)
        self._names[work] = (id, source)
        try:
            self.engine.submit(work)
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
                if not self.engine.alive:
                    raise RuntimeError("the engine's thread has ended; the log says why") from None

    # The engine's watcher

    def started(self, work: Work) -> None: ...
    def stepped(self, work: Work, progress: Progress) -> None: ...
    def ticked(self, rows: int, seconds: float) -> None: ...

    def drawn(self, work: Work, drawn: Drawn) -> None:
        self._pool.submit(self._encode, work, drawn)

    def ended(self, work: Work, state: str, error: Refusal | None) -> None:
        self._put(work, error=error or Refusal(500, state))

    def _encode(self, work: Work, drawn: Drawn) -> None:
        try:
            (png,), about = encoded(self.pipe, self.options, work, drawn)
            self._put(work, png=png, seed=about["seed"], seconds=drawn.running)
        except Exception as error:
            self._put(work, error=Refusal(500, f"{type(error).__name__}: {error}"))

    def _put(self, work: Work, **found) -> None:
        id, source = self._names.pop(work)
        self.done.put(Picture(id, source, **found))


def draw(lines: Iterable[Line], drawer: Drawer, ordered: Ordered, results: Results) -> Iterator[str]:
    """Draw what is missing. Yields what became of each picture as it does: drawn, there, refused, failed."""
    asked: set[str] = set()
    for line in lines:
        try:
            missing = []
            for id, make in ordered.of(line):
                if id in asked or results.has(id, line.source):
                    yield "there"
                else:
                    asked.add(id)
                    missing.append((id, make()))
        except Refusal as error:
            yield refuse(line, error, results)
            continue
        for id, order in missing:
            for warning in order.warnings:
                say(f"warning: {line.source}: {warning}")
            while not drawer.room:
                yield take(drawer.next(), results)
            drawer.submit(id, line.source, order)
    while drawer.busy:
        yield take(drawer.next(), results)


def take(picture: Picture, results: Results) -> str:
    """Keep what a worker hands back."""
    if picture.png is not None:
        results.save(picture.id, picture.png, picture.seed, picture.seconds, picture.source)
        return "drawn"
    results.add(Row(picture.id, None, None, None, str(picture.error), picture.source))
    return "failed" if picture.error.status >= 500 else "refused"


def refuse(line: Line, error: Refusal, results: Results) -> str:
    """Note a bad request, once, by a hash of what it says."""
    id = hashlib.sha256(repr((line.source, line.body, line.error)).encode(errors="replace")).hexdigest()[:32]
    if not results.refused(id):
        results.add(Row(id, None, None, None, str(error), line.source))
    return "refused"
