"""Who is let in: room among those that wait and in a step, the newest of a session; how one that was stopped ends."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from runtime.pipeline import LocalControlPipeline
from runtime.serve.limits import MIB, Limits
from runtime.serve.refusals import Refusal
from runtime.serve.work import REPLACED, Work

ROWS = 16  # of the model's own size, in a step, where neither an option nor a GPU's memory says how many


def check_room(queue: Iterable[Work], work: Work, limits: Limits, keyed: bool) -> None:
    """Raise Refusal where too much waits already. keyed: whether the work's owner is one of several."""
    waiting = [other for other in queue if not other.stopped and not _gives_way(other, work)]
    own = sum(other.owner == work.owner for other in waiting)
    held = sum(other.order.bytes for other in waiting) + work.order.bytes
    full = {
        f"queue: {len(waiting)} requests wait": len(waiting) >= limits.queue,
        f"queue: {own} requests of this key wait": keyed and own >= limits.queue_per_key,
        "queue: its pictures fill the memory": waiting and held > limits.queue_mib * MIB,
    }
    for message, is_full in full.items():
        if is_full:
            raise Refusal(429, f"{message}; send it again later", retry_after=2)


def replace_older(works: Iterable[Work], work: Work) -> None:
    """Have older works of the same session end."""
    for other in works:
        if _gives_way(other, work):
            other.stop("cancelled", REPLACED)


def end_of(work: Work) -> tuple[str, Refusal]:
    """Return the state in which a work that was stopped ends, and what its client is told."""
    state, why = work.stopped
    status = {"failed": 504, "interrupted": 503}.get(state, 409)
    return state, Refusal(status, why, retry_after=5 if status == 503 else None)


def _gives_way(older: Work, newer: Work) -> bool:
    """Return whether a newer request of the same session takes an older one's place."""
    return newer.session is not None and (older.owner, older.session) == (newer.owner, newer.session)


def most_rows(pipe: LocalControlPipeline) -> int:
    """Return how many rows of the model's own size a step may have: as many as its engine takes, or a GPU's memory."""
    profile = pipe.denoiser.profile
    if profile is not None and profile.range("rows")[2] < 2**10:  # one that was built for a number of them
        return profile.range("rows")[2]
    if pipe.device.type != "cuda":
        return ROWS
    torch.cuda.reset_peak_memory_stats(pipe.device)
    before = torch.cuda.memory_allocated(pipe.device)
    pipe.warm_up()
    row = (torch.cuda.max_memory_allocated(pipe.device) - before) / 2  # two rows, and what decoding takes
    free = torch.cuda.mem_get_info(pipe.device)[0]
    return int(min(max(2, 0.8 * free / row), 4 * ROWS))
