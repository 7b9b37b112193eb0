"""The engine's thread: it owns the pipeline, and takes a step of every request that fits at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from kernels import ops
from runtime.errors import Cancelled, InputError
from runtime.model.attention import use_attention
from runtime.pipeline import LocalControlPipeline
from runtime.sampling.batch import Batch
from runtime.sampling.drawing import Drawing
from runtime.sampling.loop import Run
from runtime.sampling.progress import Progress
from runtime.serve.admission import check_room, end_of, most_rows, replace_older
from runtime.serve.limits import Limits
from runtime.serve.orders import weight
from runtime.serve.refusals import Refusal
from runtime.serve.work import Drawn, Watcher, Work

log = logging.getLogger("runtime.serve")
IDLE = 0.5  # seconds after which a thread that waits looks at its requests' ages


@dataclass(eq=False)
class Active:
    """A work that runs: its runs, and the one at hand."""

    work: Work
    drawing: Drawing
    runs: Iterator[Run]
    run: Run | None = None


class Engine:
    """Queue, admission and steps.

    A request joins between two steps, where its rows fit; in the order of their coming, but that smaller ones pass a
    large one for which there is no room, until it has waited for `patience`: then nobody passes it.
    """

    def __init__(self, pipe: LocalControlPipeline, limits: Limits, watcher: Watcher):
        self.pipe, self.limits, self.watcher = pipe, limits, watcher
        self.rows = limits.rows or most_rows(pipe)
        self._queue: list[Work] = []
        self._active: list[Active] = []
        self._changed = threading.Condition()
        self.draining, self._stopping, self.warm = False, False, False
        self.beat = time.monotonic()
        self._batch: Batch | None = None
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def depth(self) -> int:
        """Return how many requests wait."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        with self._changed:
            return bool(self._queue or self._active)

    def submit(self, work: Work, keyed: bool = False) -> None:
        """Queue a request. keyed: whether its owner is one of several. Raises Refusal where there is no room."""
        with self._changed:
            self._check_room(work, keyed)
            replace_older(self._works(), work)
            gone = self._take_stopped()  # at once: a step may be long, and each holds its pictures
            work.events.publish("queued", position=len(self._queue))
            self._queue.append(work)
            self._changed.notify_all()
        for other in gone:
            self._end_as_asked(other)

    def _take_stopped(self) -> list[Work]:
        """Take from the queue those that were stopped, for the caller to end; under the lock."""
        gone = [work for work in self._queue if work.stopped]
        self._queue = [work for work in self._queue if work not in gone]
        return gone

    def _check_room(self, work: Work, keyed: bool) -> None:
        if self.draining or not self.alive:
            raise Refusal(503, "server: it is ending; send the request again", retry_after=5)
        check_room(self._queue, work, self.limits, keyed)

    def wake(self) -> None:
        """Have the thread look at its requests: one was stopped."""
        with self._changed:
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more; those that wait end at once, those that run go on."""
        with self._changed:
            self.draining = True
            for work in self._queue:
                work.stop("interrupted", "server: it is ending; send the request again")
            self._changed.notify_all()

    def _works(self) -> list[Work]:
        """Return all that wait or run; under the lock."""
        return [*self._queue, *(active.work for active in self._active)]

    def stop(self, seconds: float = 5.0) -> None:
        """End all that runs, before its next step, and the thread; wait for it for so long."""
        self.drain()
        with self._changed:
            for work in self._works():
                work.stop("interrupted", "server: it has ended; send the request again")
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def close(self) -> None:
        """End all that runs, and wait for the pictures that are being written."""
        self.stop(1.0)
        self.watcher.close()

    def _serve(self) -> None:
        with torch.inference_mode(), ops.use_backend(self.pipe.backend):
            try:
                self._warm_up()
                while self._wait():
                    self._end_stopped()
                    self._admit()
                    self._tick()
            except BaseException:
                log.exception("the engine's thread has ended")
                raise
            finally:
                with self._changed:
                    self.draining = True
                    left = self._works()
                for work in left:
                    self._end(work, "interrupted", Refusal(503, "server: it has ended", retry_after=5))

    def _warm_up(self) -> None:
        try:
            self.pipe.warm_up()
        except InputError as error:  # engines that were built for other sizes alone
            log.warning("warm-up: %s", error)
        self.warm = True

    def _wait(self) -> bool:
        """Wait for something to do. Returns whether to go on."""
        with self._changed:
            while not (self._queue or self._active):
                self._batch = None  # what it kept of its last call
                self.beat = time.monotonic()
                if self._stopping:
                    return False
                self._changed.wait(IDLE)
            self.beat = time.monotonic()
            return True

    def _end_stopped(self) -> None:
        """End what is to be stopped, or has taken too long."""
        now = time.monotonic()
        with self._changed:
            for work in self._queue:
                if now - work.created > self.limits.queued_seconds:
                    work.stop("failed", f"queue: it waited for more than {self.limits.queued_seconds:g} s")
            gone = self._take_stopped()
        for active in self._active:
            if now - active.work.started > self.limits.running_seconds:
                active.work.stop("failed", f"work: it took more than {self.limits.running_seconds:g} s")
        for work in gone:
            self._end_as_asked(work)
        for active in list(self._active):
            if active.work.stopped:
                self._leave(active)
                self._end_as_asked(active.work)

    def _admit(self) -> None:
        """Begin what fits."""
        while (work := self._next()) is not None:
            work.started = time.monotonic()
            self.watcher.started(work)
            try:
                with work.order.warned():
                    drawing = Drawing(self.pipe, work.order.request, partial(self._stepped, work))
            except Exception as error:
                self._fail(work, error)
                continue
            active = Active(work, drawing, drawing.runs())
            with self._changed:
                self._active.append(active)
            self._go_on(active)

    def _next(self) -> Work | None:
        """Take from the queue the next request that there is room for."""
        with self._changed:
            free = self.rows - sum(self._weight(active.work) for active in self._active)
            for work in self._queue:
                if self._weight(work) <= free or not self._active:
                    self._queue.remove(work)
                    return work
                if time.monotonic() - work.created > self.limits.patience:
                    return None
            return None

    def _weight(self, work: Work) -> float:
        """Return a request's rows, as rows of the model's own size."""
        return weight(work.order.request, self.pipe.default_size)

    def _tick(self) -> None:
        """Take a step of every run; those that share none with others by themselves."""
        if not self._active:
            return
        self._batch = self._batch or Batch(self.pipe.denoiser)
        alone = [active for active in self._active if active.work.order.body.deterministic]
        shared = [active for active in self._active if active not in alone]
        for group in ([shared] if shared else []) + [[active] for active in alone]:
            start, rows = time.perf_counter(), sum(active.run.rows for active in group)
            failed = self._step(group)
            self.watcher.ticked(rows, time.perf_counter() - start)
            for active in group:
                if active.run in failed:
                    self._leave(active)
                    self._fail(active.work, failed[active.run])
                elif active.run.done:
                    self._go_on(active)

    def _step(self, group: list[Active]) -> dict[Run, Exception]:
        """Take a step of each; what fails together is tried one by one, so that it is one request's fault alone."""
        pipe, runs = self.pipe, [active.run for active in group]
        at = [run.index for run in runs]
        with pipe.at_work("denoise"), use_attention(pipe.attention):
            try:
                return self._batch.tick(runs)
            except Exception:
                if len(runs) > 1:
                    log.warning(
                        "%d requests failed together; each is tried by itself", len(runs), exc_info=True
                    )
                self._batch = Batch(pipe.denoiser)
                failed = {}
                for run, before in zip(runs, at, strict=True):
                    if run.index != before:  # of another size, whose step was taken before this one failed
                        continue
                    try:
                        failed |= self._batch.tick([run])
                    except Exception as error:
                        failed[run] = error
                return failed

    def _go_on(self, active: Active) -> None:
        """Prepare a request's next run; after the last one its pictures are there."""
        work = active.work
        try:
            with work.order.warned():
                active.run = next(active.runs, None)
        except Exception as error:
            self._leave(active)
            self._fail(work, error)
            return
        if active.run is None:
            self._leave(active)
            seconds = work.started - work.created, time.monotonic() - work.started
            self.watcher.drawn(work, Drawn(active.drawing.result, *seconds))

    def _leave(self, active: Active) -> None:
        with self._changed:
            if active in self._active:
                self._active.remove(active)
        active.runs.close()

    def _stepped(self, work: Work, progress: Progress) -> None:
        work.steps_done = progress.step
        self.watcher.stepped(work, progress)

    def _end_as_asked(self, work: Work) -> None:
        self._end(work, *end_of(work))

    def _fail(self, work: Work, error: Exception) -> None:
        if isinstance(error, Cancelled) and work.stopped:
            self._end_as_asked(work)
        elif isinstance(error, InputError):
            self._end(work, "failed", Refusal.of(error))
        else:
            log.error("request %s", work.id, exc_info=error)
            self._end(work, "failed", Refusal(500, f"server: {type(error).__name__}; its log says more"))

    def _end(self, work: Work, state: str, error: Refusal) -> None:
        work.error = error
        self.watcher.ended(work, state, error)
