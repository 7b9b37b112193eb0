"""Jobs on the disk: what was asked for, what became of it, and its pictures; they outlive the server."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from runtime.errors import InputError
from runtime.machine.files import replacing
from runtime.serve.limits import MIB, Limits
from runtime.serve.refusals import Refusal

log = logging.getLogger("runtime.serve")
FORMAT = 1  # of the table; a store of another one is begun anew
OPEN, ENDED = ("queued", "running"), ("done", "failed", "cancelled", "interrupted")
TABLE = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, key TEXT, state TEXT NOT NULL, body TEXT NOT NULL,
    created REAL NOT NULL, started REAL, ended REAL, error TEXT, result TEXT, bytes INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX job_keys ON jobs (owner, key) WHERE key IS NOT NULL;
CREATE INDEX job_times ON jobs (created);
"""


@dataclass(frozen=True)
class Job:
    """A job as it is stored. owner: a hash of the API key that sent it. key: its Idempotency-Key. times: Unix seconds.

    error: the body of the refusal, of a job that failed. result: seed, timings and so on, of one that is done.
    """

    id: str
    owner: str
    key: str | None
    state: str
    body: dict[str, Any]
    created: float
    started: float | None
    ended: float | None
    error: dict | None
    result: dict | None
    bytes: int


class Store:
    """A SQLite table of jobs, and a folder with the pictures of each that is done. From any thread."""

    def __init__(self, folder: Path, limits: Limits):
        """Open or make it. Jobs that another process has left open are interrupted; what it left half-written goes."""
        self.limits, self.pictures = limits, folder / "pictures"
        self.pictures.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        try:
            self._open(folder / "jobs.sqlite")
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{folder / 'jobs.sqlite'}: {error}; move it away, or name another --data"
            ) from error
        done = {row["id"] for row in self._run("SELECT id FROM jobs WHERE state = 'done'")}
        for left in self.pictures.iterdir():
            if left.name not in done:
                shutil.rmtree(left, ignore_errors=True)
        self.clean()

    def _open(self, path: Path) -> None:
        self._table = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._table.row_factory = sqlite3.Row
        self._table.execute("PRAGMA journal_mode = WAL")
        self._table.execute("PRAGMA synchronous = FULL")  # what was acknowledged outlives a power cut
        if self._table.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
            self._table.executescript(f"DROP TABLE IF EXISTS jobs; {TABLE} PRAGMA user_version = {FORMAT};")
        self._run(
            "UPDATE jobs SET state = 'interrupted', ended = ? WHERE state IN ('queued', 'running')",
            time.time(),
        )

    def add(self, body: dict, owner: str, key: str | None = None) -> tuple[Job, bool]:
        """Keep a new job; with a key that its owner has used, find that job. Returns it, and whether it is new.

        Raises Refusal where the key was used for another body.
        """
        text = json.dumps(body, sort_keys=True)
        with self._lock:
            if found := self.sent(owner, key):
                if json.dumps(found.body, sort_keys=True) != text:
                    message = f"Idempotency-Key {key[:40]!r}: used for another request; expected a new key"
                    raise Refusal(422, message, "Idempotency-Key")
                return found, False
            name = secrets.token_urlsafe(16)
            self._run(
                "INSERT INTO jobs (id, owner, key, state, body, created) VALUES (?, ?, ?, 'queued', ?, ?)",
                *(name, owner, key, text, time.time()),
            )
            self._clean_after()
            return self.get(name, owner), True

    def sent(self, owner: str, key: str | None) -> Job | None:
        """Return the job that was sent with a key; None where there is none, or no key."""
        with self._lock:
            found = self._run("SELECT * FROM jobs WHERE owner = ? AND key = ?", owner, key).fetchone()
        return found and _job(found)

    def reopen(self, name: str) -> Job:
        """Queue an interrupted, failed or cancelled job again. Raises Refusal where it is in another state."""
        with self._lock:
            done = self._run(
                "UPDATE jobs SET state = 'queued', started = NULL, ended = NULL, error = NULL WHERE id = ? AND state "
                "IN ('interrupted', 'failed', 'cancelled')",
                name,
            )
            if done.rowcount == 0:
                raise Refusal(
                    409, f"job {name}: not ended without a picture, so it cannot be sent again", "id"
                )
            return _job(self._run("SELECT * FROM jobs WHERE id = ?", name).fetchone())

    def get(self, name: str, owner: str) -> Job:
        """Return a job. Raises Refusal where its owner has none of that name."""
        with self._lock:
            row = self._run("SELECT * FROM jobs WHERE id = ? AND owner = ?", name, owner).fetchone()
        if row is None:
            raise Refusal(404, f"job {name[:40]!r}: there is none; it may have been removed", "id")
        return _job(row)

    def remove(self, name: str, ended: bool = False) -> bool:
        """Forget a job and its pictures. ended: only if it has ended. Returns whether it did."""
        with self._lock:
            only = " AND state NOT IN ('queued', 'running')" if ended else ""
            if self._run(f"DELETE FROM jobs WHERE id = ?{only}", name).rowcount == 0:
                return False
            shutil.rmtree(self.pictures / name, ignore_errors=True)
            return True

    def put_back(self, job: Job) -> None:
        """Have a job that was queued again be as it was."""
        with self._lock:
            self._run(
                "UPDATE jobs SET state = ?, started = ?, ended = ?, error = ? WHERE id = ?",
                *(job.state, job.started, job.ended, job.error and json.dumps(job.error), job.id),
            )

    def start(self, name: str) -> None:
        """Note that a job's first step is taken."""
        with self._lock:
            self._run(
                "UPDATE jobs SET state = 'running', started = ? WHERE id = ? AND state = 'queued'",
                *(time.time(), name),
            )

    def finish(self, name: str, pictures: Sequence[bytes], result: dict) -> bool:
        """Keep a job's pictures, then that it is done: one that is done has all of them.

        Returns whether it is; not where it was cancelled or forgotten meanwhile. Raises OSError or sqlite3.Error where
        the disk does not take it.
        """
        folder = self.pictures / name
        folder.mkdir(exist_ok=True)
        for i, picture in enumerate(pictures):
            with replacing(folder / f"{i}.png") as partial:
                partial.write_bytes(picture)
        with self._lock:
            size = sum(map(len, pictures))
            done = self._run(
                "UPDATE jobs SET state = 'done', ended = ?, result = ?, bytes = ? WHERE id = ? "
                "AND state IN ('queued', 'running')",
                *(time.time(), json.dumps(result), size, name),
            )
            if done.rowcount == 0 and not self._is_done(name):
                shutil.rmtree(folder, ignore_errors=True)
            self._clean_after()
            return done.rowcount > 0

    def end(self, name: str, state: str, error: dict | None = None) -> None:
        """Note that an open job has ended without a picture."""
        with self._lock:
            self._run(
                "UPDATE jobs SET state = ?, ended = ?, error = ? WHERE id = ? AND state IN ('queued', 'running')",
                *(state, time.time(), error and json.dumps(error), name),
            )

    def picture(self, job: Job, index: int) -> bytes:
        """Return a picture's PNG. Raises Refusal where the job has none of that number, or not yet."""
        if job.state != "done":
            raise Refusal(409, f"job {job.id}: {job.state}; its pictures are there once it is done", "id")
        try:
            return (self.pictures / job.id / f"{index}.png").read_bytes()
        except OSError:
            raise Refusal(404, f"image {index}: expected 0 to {job.result['images'] - 1}", "image") from None

    def clean(self) -> None:
        """Remove ended jobs that are too old, and where they are too many or too large the oldest of who has most."""
        with self._lock:
            rows = self._run(
                "SELECT id, owner, bytes, coalesce(ended, created) AS at FROM jobs "
                "WHERE state NOT IN ('queued', 'running') ORDER BY at"
            ).fetchall()
            oldest = time.time() - self.limits.kept_hours * 3600
            count = self._run("SELECT count(*) FROM jobs").fetchone()[0] - self.limits.jobs
            size = sum(row["bytes"] for row in rows) - self.limits.kept_mib * MIB
            while rows and (rows[0]["at"] < oldest or count > 0 or size > 0):
                row = rows[0] if rows[0]["at"] < oldest else _to_go(rows, by_number=count > 0)
                self.remove(row["id"])
                rows.remove(row)
                count, size = count - 1, size - row["bytes"]

    def _clean_after(self) -> None:
        """Clean after a change that is kept already, and that therefore does not fail with it."""
        try:
            self.clean()
        except (OSError, sqlite3.Error) as error:
            log.error("cleaning", exc_info=error)

    def close(self) -> None:
        with self._lock, suppress(sqlite3.Error):
            self._table.close()

    def _is_done(self, name: str) -> bool:
        return self._run("SELECT id FROM jobs WHERE id = ? AND state = 'done'", name).fetchone() is not None

    def _run(self, command: str, *values: Any) -> sqlite3.Cursor:
        return self._table.execute(command, values)


def _to_go(rows: Sequence[sqlite3.Row], by_number: bool) -> sqlite3.Row:
    """Return the first job of the owner who has most, jobs or bytes: nobody pushes out what others keep."""
    has: Counter[str] = Counter()
    for row in rows:
        has[row["owner"]] += 1 if by_number else row["bytes"]
    most = has.most_common(1)[0][0]
    return next(row for row in rows if row["owner"] == most and (by_number or row["bytes"]))


def _job(row: sqlite3.Row) -> Job:
    fields = dict(row)
    for name in ("body", "error", "result"):
        fields[name] = fields[name] and json.loads(fields[name])
    return Job(**fields)


def milliseconds(when: float) -> int:
    """Return a time as a number for an event of a job: later than all of its events before."""
    return int(1000 * when)


def stored(body: BaseModel) -> dict[str, Any]:
    """Return what is kept of a request: what it says, and no default."""
    return body.model_dump(mode="json", exclude_none=True, exclude_defaults=True)


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
