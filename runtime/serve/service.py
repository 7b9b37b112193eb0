"""What the routes stand on: orders in, work through the engine, pictures and jobs out."""

from __future__ import annotations

import argparse
import json
import logging
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from runtime.pipeline import LocalControlPipeline
from runtime.serve.admission import most_rows
from runtime.serve.engine import Engine
from runtime.serve.events import Events
from runtime.serve.files import Files
from runtime.serve.identity import Served
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics, resident_bytes
from runtime.serve.orders import Order, Orders
from runtime.serve.pictures import Encoder
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Generate
from runtime.serve.store import OPEN, Job, Store, milliseconds, shown, stored
from runtime.serve.work import Work

log = logging.getLogger("runtime.serve")
REMEMBERED = 256  # jobs, and all that are open, whose events can be read again
STAGES = ("encode", "text", "adapter", "reference", "denoise", "decode", "save")


class Service:
    """One model and all that serves it. Made before the server listens; `start` and `close` around its life."""

    def __init__(self, served: Served, folder: Path, limits: Limits, make_engine: Callable[[Service], Any]):
        """folder: of files and jobs, this process's alone. make_engine: of what tells the service of its works."""
        self.served, self.limits = served, limits
        self.metrics = Metrics()
        self.files, self.store = Files(folder / "files", limits), Store(folder / "jobs", limits)
        self.orders = Orders(served.capabilities, self.files, limits, limits.oversize * served.rows)
        self._jobs: dict[str, Work] = {}  # that are open
        self._events: OrderedDict[str, Events] = OrderedDict()
        self._lock = threading.Lock()  # of the sets below, never held over the disk
        self._adding = threading.Lock()  # so that a key that comes twice at a time is one job
        self._open: set[Work] = set()  # whose end has not been told
        self._writer = ThreadPoolExecutor(1, "store")  # one thread: a job's states come in their order
        self.engine = engine = make_engine(self)
        self.metrics.gauge("queue_depth", "requests that wait", lambda: engine.depth)
        self.metrics.gauge("resident_bytes", "memory of the process", resident_bytes)
        self.metrics.gauge(
            "engine_beat_age_seconds",
            "since the engine's thread was last seen",
            lambda: time.monotonic() - engine.beat,
        )

    @classmethod
    def of(
        cls,
        pipe: LocalControlPipeline,
        folder: Path,
        options: argparse.Namespace,
        limits: Limits | None = None,
        model_hash: str = "",
    ) -> Service:
        """Return the service of a pipeline in this process. options: of the command line, that say what was loaded."""
        limits = limits or Limits()
        rows = limits.rows or most_rows(pipe)
        served, own = Served.of(pipe, model_hash, rows), replace(limits, rows=rows)
        made = cls(served, folder, limits, lambda service: Engine(pipe, own, Encoder(pipe, options, service)))
        if pipe.device.type == "cuda":
            allocated = torch.cuda.memory_allocated
            made.metrics.gauge("gpu_bytes", "memory of the GPU in use", lambda: allocated(pipe.device))
        return made

    def start(self) -> None:
        self.engine.start()

    def close(self) -> None:
        """End the engine's thread and what it runs; open jobs are interrupted."""
        self.engine.close()
        self._writer.shutdown()
        self.store.close()

    def clean(self) -> None:
        """Remove files and jobs that are too old."""
        self.files.clean()
        self.store.clean()

    @property
    def unfinished(self) -> int:
        """Return how many requests wait, run, or are being written."""
        return len(self._open)

    @property
    def not_ready(self) -> str | None:
        """Return why no request can be taken now."""
        if not self.engine.alive:
            return "the engine's thread has ended"
        return None if self.engine.warm else "warming up"

    # What handlers call, in threads of their own

    def submit(self, body: Generate, owner: str, keyed: bool) -> Work:
        """Queue a request. Raises Refusal."""
        order = self.orders.order(body)
        followed = getattr(body, "stream", False) or body.previews
        work = Work(order, owner, body.session, body.previews, followed)
        self._submit(work, keyed)
        return work

    def _submit(self, work: Work, keyed: bool) -> None:
        with self._lock:
            self._open.add(work)
            if work.job:
                self._jobs[work.id] = work
        try:
            self.engine.submit(work, keyed)
        except BaseException:
            self._close(work)
            raise

    def _close(self, work: Work) -> None:
        with self._lock:
            self._open.discard(work)
            if self._jobs.get(work.id) is work:
                del self._jobs[work.id]

    def submit_job(self, body: Generate, owner: str, keyed: bool, key: str | None) -> Job:
        """Keep a job, then queue it. Of a key that was used, return that job. Raises Refusal."""
        try:
            order = self.orders.order(body)  # what is wrong is said before anything is kept
        except Refusal:
            sent = self.store.sent(owner, key)
            if sent is None or stored(self.orders.kept(body)) != sent.body:
                raise
            return sent  # a file of it has gone since then
        kept = stored(self.orders.kept(body))
        with self._adding:
            job, is_new = self.store.add(kept, owner, key)
            if is_new:
                return self._queue(job, order, keyed)
            job = self._sound(job)
            if job.state != "interrupted":
                return job
            return self._queue(self.store.reopen(job.id), order, keyed, before=job)

    def job(self, name: str, owner: str) -> Job:
        """Return a job. Raises Refusal where its owner has none of that name."""
        job = self.store.get(name, owner)
        if not self._is_lost(job):
            return job
        with self._adding:  # it may be about to be queued
            try:
                return self._sound(job)
            except sqlite3.Error as error:  # the disk is full still, but a job can be read
                log.error("job %s", job.id, exc_info=error)
                return replace(job, state="interrupted")

    def _sound(self, job: Job) -> Job:
        """Return a job as it is; interrupted where it is lost, so that it can be sent again or removed."""
        if not self._is_lost(job):
            return job
        self.store.end(job.id, "interrupted")
        return self.store.get(job.id, job.owner)

    def _is_lost(self, job: Job) -> bool:
        """Return whether a job is open and nobody draws it: the disk did not take its end."""
        with self._lock:
            return job.state in OPEN and job.id not in self._jobs

    def again(self, job: Job, keyed: bool) -> Job:
        """Queue a job again that has ended without its pictures. Raises Refusal."""
        order = self.orders.order(Generate.model_validate_json(json.dumps(job.body)))
        with self._adding:
            self._sound(self.store.get(job.id, job.owner))
            return self._queue(self.store.reopen(job.id), order, keyed, before=job)

    def _queue(self, job: Job, order: Order, keyed: bool, before: Job | None = None) -> Job:
        """before: what it goes back to where there is no room; None for a job that is then forgotten."""
        # who has heard of an earlier try asks for what comes after its last event
        events = Events(milliseconds(time.time()) if before else 0)
        named = {"job": True, "id": job.id, "events": events}
        work = Work(order, job.owner, order.body.session, order.body.previews, **named)
        try:
            self._submit(work, keyed)
        except BaseException:  # whatever it is, nobody would draw it
            self.store.put_back(before) if before else self.store.remove(job.id)
            raise
        self._remember(job.id, work.events)
        return job

    def _remember(self, id: str, events: Events) -> None:
        """Keep a job's events; of many, those of the jobs that have ended go, the oldest first."""
        with self._lock:
            self._events[id] = events
            self._events.move_to_end(id)
            ended = [each for each in self._events if each not in self._jobs]
            for each in ended[: max(0, len(self._events) - REMEMBERED)]:
                del self._events[each]

    def events_of(self, job: Job) -> Events | None:
        """Return a job's events, where this process has them still."""
        with self._lock:
            return self._events.get(job.id)

    def cancel(self, job: Job) -> Mapping[str, Any]:
        """Stop a job that is open, or forget one that has ended. Returns what a client is told."""
        with self._lock:
            work = self._jobs.get(job.id)
        if self.store.remove(job.id, ended=True):
            return {**shown(job), "removed": True}
        if work is not None and work.stop("cancelled", "cancelled"):
            self.engine.wake()
        return {**shown(self.store.get(job.id, job.owner)), "cancelling": True}

    # What it is told of its works: see `pictures.Hearer`

    def started(self, work: Work) -> None:
        self.metrics.stage_seconds.labels("queue").observe(work.started - work.created)
        work.events.publish("started")
        if work.job:
            self._writer.submit(self._noted, self.store.start, work.id)

    def stepped(self, work: Work, step: int, steps: int) -> None:
        self.metrics.steps.inc()
        work.events.publish("step", step=step, steps=steps)

    def previewed(self, work: Work, step: int, steps: int, images: list[str]) -> None:
        work.events.publish("preview", step=step, steps=steps, images=images)

    def finished(self, work: Work, pictures: list[bytes], result: dict[str, Any]) -> None:
        """Keep the pictures where they are a job's, and tell."""
        result |= {"model": self.served.name, "hash": self.served.hash}
        for stage in STAGES:
            if stage in result["timings"]:
                self.metrics.stage_seconds.labels(stage).observe(result["timings"][stage])
        self.metrics.images.inc(len(pictures))
        self.metrics.ended.labels("done").inc()
        if work.job:
            self._writer.submit(self._noted, self._keep, work, pictures, result)
        else:
            work.pictures = pictures
            self._done(work, result)

    def ended(self, work: Work, state: str, error: Refusal) -> None:
        self.metrics.ended.labels(state).inc()
        work.error = error
        if work.job:
            self._writer.submit(self._noted, self._end, work, state, error)
        else:
            self._tell(work, state, error)

    def ticked(self, rows: int, seconds: float) -> None:
        self.metrics.tick_rows.observe(rows)
        self.metrics.tick_seconds.observe(seconds)

    # On a thread of its own

    def _keep(self, work: Work, pictures: list[bytes], result: dict[str, Any]) -> None:
        try:
            kept = self.store.finish(work.id, pictures, result)
        except Exception as error:  # the disk is full
            log.error("job %s", work.id, exc_info=error)
            self._end(work, "failed", Refusal(500, "server: the disk does not take the pictures"))
            return
        if kept:
            self._done(work, result)
        else:
            self._tell(work, "cancelled", Refusal(409, "cancelled"))

    def _done(self, work: Work, result: dict[str, Any]) -> None:
        work.result = result
        work.events.publish("done", **result)
        self._close(work)

    def _end(self, work: Work, state: str, error: Refusal) -> None:
        try:
            self.store.end(work.id, state, error.body()["error"])
        finally:
            self._tell(work, state, error)

    def _tell(self, work: Work, state: str, error: Refusal) -> None:
        work.error = error
        work.events.publish(state, **error.body(), status=error.status)
        self._close(work)

    @staticmethod
    def _noted(call, *arguments) -> None:
        """Run on a pool's thread, where nobody would hear of an error."""
        try:
            call(*arguments)
        except Exception as error:
            log.error("server", exc_info=error)
