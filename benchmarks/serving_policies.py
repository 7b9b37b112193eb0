"""The schedulers that benchmarks.serving compares with `runtime.serve.engine.Engine`, and what is noted of them all."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from kernels import ops
from runtime import LocalControlPipeline
from runtime.model.attention import use_attention
from runtime.sampling.batch import Batch
from runtime.sampling.drawing import Drawing
from runtime.sampling.progress import Progress
from runtime.sampling.result import Result
from runtime.serve.engine import Engine, Watcher
from runtime.serve.limits import Limits
from runtime.serve.refusals import Refusal
from runtime.serve.work import Drawn, Work


class Notes:
    """A watcher that notes when what happened, in seconds of time.monotonic(), and says which request has ended."""

    def __init__(self) -> None:
        self.first: dict[Work, float] = {}  # when the first step was done, and so the first preview there
        self.ends: dict[Work, float] = {}
        self.results: dict[Work, Result] = {}
        self.rows: list[int] = []  # of each tick
        self._ended: queue.SimpleQueue[Work] = queue.SimpleQueue()

    def started(self, work: Work) -> None:
        """Do nothing: what counts is when its first step is done."""

    def stepped(self, work: Work, progress: Progress) -> None:
        if work not in self.first:
            if progress.latents.is_cuda:  # a preview would wait for them, too
                torch.cuda.synchronize(progress.latents.device)
            self.first[work] = time.monotonic()

    def drawn(self, work: Work, drawn: Drawn) -> None:
        self.ends[work], self.results[work] = time.monotonic(), drawn.result
        self._ended.put(work)

    def ended(self, work: Work, state: str, error: Refusal | None) -> None:
        self._ended.put(work)

    def ticked(self, rows: int, seconds: float) -> None:
        self.rows.append(rows)

    def next_end(self) -> None:
        """Wait until one more request has ended. Raises RuntimeError where it has no picture."""
        work = self._ended.get()
        if work not in self.ends:
            raise RuntimeError(f"request {work.order.request.seed} was not drawn: {work.error}")


class Baseline:
    """A thread that takes requests from a queue and draws them to their end before it takes others."""

    def __init__(self, pipe: LocalControlPipeline, limits: Limits, watcher: Watcher):
        self.pipe, self.rows, self.watcher = pipe, limits.rows, watcher
        self._queue: list[Work] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name=type(self).__name__, daemon=True)
        self.warm = True  # nothing to wait for

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Queue a request."""
        with self._changed:
            self._queue.append(work)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread, after what it draws."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        try:
            while works := self._take():
                self._try(works)
        finally:
            for work in self._queue:  # nobody waits for them in vain
                self.watcher.ended(work, "interrupted", None)

    def _try(self, works: list[Work]) -> None:
        """Draw requests, and tell of those that fail."""
        for work in works:
            work.started = time.monotonic()
        try:
            self._draw(works)
        except Exception as error:
            for work in works:
                work.error = Refusal(500, f"{type(error).__name__}: {error}")
                self.watcher.ended(work, "failed", work.error)

    def _take(self) -> list[Work]:
        """Wait for requests, and take them from the queue; none at the end."""
        with self._changed:
            while not self._stopping:
                works, seconds = self._chosen()
                for work in works:
                    self._queue.remove(work)
                if works:
                    return works
                self._changed.wait(seconds)
            return []

    def _chosen(self) -> tuple[list[Work], float | None]:
        """Return the requests to draw next; where there are none, seconds after which to look again."""
        raise NotImplementedError

    def _draw(self, works: list[Work]) -> None:
        raise NotImplementedError

    def _hand_over(self, work: Work, result: Result) -> None:
        seconds = work.started - work.created, time.monotonic() - work.started
        self.watcher.drawn(work, Drawn(result, *seconds))


class OneByOne(Baseline):
    """One request at a time, in the order of their coming."""

    def _chosen(self) -> tuple[list[Work], float | None]:
        return self._queue[:1], None

    def _draw(self, works: list[Work]) -> None:
        (work,) = works
        self._hand_over(work, self.pipe.draw(work.order.request, partial(self._stepped, work)))

    def _stepped(self, work: Work, progress: Progress) -> None:
        self.watcher.ticked(work.rows, 0.0)
        self.watcher.stepped(work, progress)


class Alike(Baseline):
    """Batches of requests of one size, number of steps, guidance and scheduler, which nobody joins or leaves.

    A batch begins once it is full, or its oldest request has waited for `window` seconds; of several the one with the
    oldest. Requests are taken from anywhere in the queue.
    """

    def __init__(self, pipe: LocalControlPipeline, limits: Limits, watcher: Watcher, window: float):
        super().__init__(pipe, limits, watcher)
        self.window = window

    def _kind(self, work: Work) -> tuple:
        request = work.order.request
        size = request.size(self.pipe.default_size)
        return size, request.run_steps, request.guidance, request.scheduler, request.images

    def _chosen(self) -> tuple[list[Work], float | None]:
        now, groups = time.monotonic(), {}
        for work in self._queue:
            groups.setdefault(self._kind(work), []).append(work)
        for group in groups.values():  # in the order of their oldest
            room = max(1, self.rows // group[0].rows)
            if len(group) >= room or now - group[0].created >= self.window:
                return group[:room], None
        return [], min((group[0].created + self.window - now for group in groups.values()), default=None)

    def _draw(self, works: list[Work]) -> None:
        pipe, batch = self.pipe, Batch(self.pipe.denoiser)
        with torch.inference_mode(), ops.use_backend(pipe.backend):
            drawings = [Drawing(pipe, w.order.request, partial(self.watcher.stepped, w)) for w in works]
            ways = [drawing.runs() for drawing in drawings]
            runs = [next(way) for way in ways]
            while not runs[0].done:  # and so the others: they have as many steps
                self.watcher.ticked(sum(run.rows for run in runs), 0.0)
                with pipe.at_work("denoise"), use_attention(pipe.attention):
                    for error in batch.tick(runs).values():
                        raise error
            for work, drawing, way in zip(works, drawings, ways, strict=True):
                next(way, None)  # decodes
                self._hand_over(work, drawing.result)


def make_policies(
    pipe: LocalControlPipeline, limits: Limits, window: float
) -> dict[str, Callable[[Watcher], Engine | Baseline]]:
    """Return what makes each scheduler, to be started, of a watcher."""
    return {
        "one by one": partial(OneByOne, pipe, limits),
        "batches of alike": partial(Alike, pipe, limits, window=window),
        "shared steps": partial(Engine, pipe, limits),
    }
