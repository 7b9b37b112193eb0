"""What the routes stand on: orders in, work through the engine, pictures and jobs out."""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from runtime.cli.presets import PRESETS
from runtime.control.images import formats
from runtime.control.levels import SIZE_MULTIPLE
from runtime.errors import InputError
from runtime.pipeline import LocalControlPipeline
from runtime.sampling.progress import Progress
from runtime.sampling.schedulers import SCHEDULERS
from runtime.serve.engine import Engine
from runtime.serve.events import Events
from runtime.serve.files import Files
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics, resident_bytes
from runtime.serve.orders import Order, Orders
from runtime.serve.pictures import base64_of, encoded, jpeg
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Generate
from runtime.serve.store import Job, Store
from runtime.serve.work import Drawn, Work

log = logging.getLogger("runtime.serve")
REMEMBERED = 256  # jobs whose events can be read again
STAGES = ("encode", "text", "adapter", "reference", "denoise", "decode")


class Service:
    """One pipeline and all that serves it. Made before the server listens; `start` and `close` around its life."""

    def __init__(
        self,
        pipe: LocalControlPipeline,
        folder: Path,
        options: argparse.Namespace,
        limits: Limits | None = None,
        model_hash: str = "",
    ):
        """folder: of files and jobs, this process's alone. options: of the command line, that say what was loaded."""
        self.pipe, self.options, self.limits, self.hash = pipe, options, limits or Limits(), model_hash
        self.metrics = Metrics()
        self.files, self.store = Files(folder / "files", self.limits), Store(folder / "jobs", self.limits)
        self.engine = Engine(pipe, self.limits, self)
        self.orders = Orders(pipe, self.files, self.limits, self.limits.oversize * self.engine.rows)
        self.name = Path(pipe.model.name).name  # without the place where it lies
        self._jobs: dict[str, Work] = {}  # that are open
        self._events: OrderedDict[str, Events] = OrderedDict()
        self._lock = threading.Lock()  # of the sets below, never held over the disk
        self._adding = threading.Lock()  # so that a key that comes twice at a time is one job
        self._open: set[Work] = set()  # whose end has not been told
        self._pool = ThreadPoolExecutor(2, "pictures")  # encodes
        self._writer = ThreadPoolExecutor(1, "store")  # one thread: a job's states come in their order
        engine, gauge = self.engine, self.metrics.gauge
        gauge("queue_depth", "requests that wait", lambda: engine.depth)
        gauge("resident_bytes", "memory of the process", resident_bytes)
        gauge(
            "engine_beat_age_seconds",
            "since the engine's thread was last seen",
            lambda: time.monotonic() - engine.beat,
        )
        if pipe.device.type == "cuda":
            gauge("gpu_bytes", "memory of the GPU in use", lambda: torch.cuda.memory_allocated(pipe.device))

    def start(self) -> None:
        self.engine.start()

    def close(self) -> None:
        """End the engine's thread and what it runs; open jobs are interrupted."""
        self.engine.stop(1.0)
        self._pool.shutdown()
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
        work = Work(order, owner, body.session, body.previews)
        self._submit(work, keyed)
        return work

    def _submit(self, work: Work, keyed: bool) -> None:
        with self._lock:
            self._open.add(work)
            if work.job:
                self._jobs[work.id] = work
        try:
            self.engine.submit(work, keyed)
        except Refusal:
            self._close(work)
            raise

    def _close(self, work: Work) -> None:
        with self._lock:
            self._open.discard(work)
            if self._jobs.get(work.id) is work:
                del self._jobs[work.id]

    def submit_job(self, body: Generate, owner: str, keyed: bool, key: str | None) -> Job:
        """Keep a job, then queue it. Of a key that was used, return that job. Raises Refusal."""
        order = self.orders.order(body)  # what is wrong is said before anything is kept
        kept = self.orders.kept(body).model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        with self._adding:
            job, is_new = self.store.add(kept, owner, key)
            if is_new:
                return self._queue(job, order, keyed)
            if job.state != "interrupted":
                return job
            return self._queue(self.store.reopen(job.id), order, keyed, before=job)

    def again(self, job: Job, keyed: bool) -> Job:
        """Queue a job again that has ended without its pictures. Raises Refusal."""
        order = self.orders.order(Generate.model_validate_json(json.dumps(job.body)))
        with self._adding:
            return self._queue(self.store.reopen(job.id), order, keyed, before=job)

    def _queue(self, job: Job, order: Order, keyed: bool, before: Job | None = None) -> Job:
        """before: what it goes back to where there is no room; None for a job that is then forgotten."""
        work = Work(order, job.owner, order.body.session, order.body.previews, job=True, id=job.id)
        try:
            self._submit(work, keyed)
        except Refusal:
            self.store.put_back(before) if before else self.store.remove(job.id)
            raise
        with self._lock:
            self._events[job.id] = work.events
            self._events.move_to_end(job.id)
            while len(self._events) > REMEMBERED:
                self._events.popitem(last=False)
        return job

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

    def capabilities(self) -> dict[str, Any]:
        """Return what can be asked for."""
        can, profile = self.orders.capabilities, self.pipe.denoiser.profile
        sizes = {"default": self.pipe.default_size, "multiple": SIZE_MULTIPLE, "most": self.limits.side}
        if profile is not None:
            for side in ("height", "width"):
                sizes[side] = [profile.range(side)[0], min(profile.range(side)[2], self.limits.side)]
        return {
            "model": self.name,
            "hash": self.hash,
            "device": str(self.pipe.device),
            "adapters": list(can.adapters),
            "controlnets": list(self.pipe.controlnets),
            "default_adapter": self.orders.default_adapter,
            "preprocessors": self.orders.preprocessors,
            "schedulers": list(SCHEDULERS),
            "presets": PRESETS,
            "sizes": sizes,
            "formats": formats(),
            "words": can.words,
            "cache": can.whole_steps is None,
            "rows": self.engine.rows,
            "limits": {name: getattr(self.limits, name) for name in vars(self.limits)},
        }

    # What the engine's thread calls: see `engine.Watcher`

    def started(self, work: Work) -> None:
        self.metrics.stage_seconds.labels("queue").observe(work.started - work.created)
        work.events.publish("started")
        if work.job:
            self._writer.submit(self._noted, self.store.start, work.id)

    def stepped(self, work: Work, progress: Progress) -> None:
        self.metrics.steps.inc()
        work.events.publish("step", step=progress.step, steps=progress.steps)
        if work.previews:
            try:
                small = progress.preview()
            except InputError:  # engines whose VAE no projection is known of
                work.previews = False
                return
            self._pool.submit(self._noted, self._preview, work, (progress.step, progress.steps), small)

    def drawn(self, work: Work, drawn: Drawn) -> None:
        for stage in STAGES:
            if stage in drawn.result.timings:
                self.metrics.stage_seconds.labels(stage).observe(drawn.result.timings[stage])
        self._pool.submit(self._finish, work, drawn)

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

    # On threads of their own

    @staticmethod
    def _preview(work: Work, at: tuple[int, int], small: list[Image.Image]) -> None:
        images = [base64_of(jpeg(image)) for image in small]
        work.events.publish("preview", step=at[0], steps=at[1], images=images)

    def _finish(self, work: Work, drawn: Drawn) -> None:
        """Encode the pictures, keep them where they are a job's, and tell."""
        try:
            start = time.perf_counter()
            pictures, result = encoded(self.pipe, self.options, work, drawn)
            result |= {"model": self.name, "hash": self.hash}
            self.metrics.stage_seconds.labels("save").observe(time.perf_counter() - start)
        except Exception as error:
            log.error("request %s", work.id, exc_info=error)
            self.ended(work, "failed", Refusal(500, f"server: {type(error).__name__}; its log says more"))
            return
        self.metrics.images.inc(len(pictures))
        self.metrics.ended.labels("done").inc()
        if work.job:
            self._writer.submit(self._noted, self._keep, work, pictures, result)
        else:
            work.pictures = pictures
            self._done(work, result)

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


def shown(job: Job) -> Mapping[str, Any]:
    """Return what a client is told of a job."""
    found = {"id": job.id, "state": job.state, "created": job.created, "started": job.started}
    found |= {"ended": job.ended, "request": job.body}
    if job.error is not None:
        found["error"] = job.error
    if job.result is not None:
        found["result"] = job.result
        found["images"] = [f"/v1/jobs/{job.id}/images/{i}" for i in range(job.result["images"])]
    return found
