"""Processes that read data beside the training."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from multiprocessing.context import BaseContext


def options(workers: int) -> dict:
    """Return the options of a DataLoader with so many workers, at most one a processor.

    They are not forked from the training process: threads of OpenCV's and OpenMP's pools do not survive a fork, and
    the first parallel loop of a child would wait for them forever.
    """
    workers = min(workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers)
    if workers == 0:
        return {"num_workers": 0}
    return {"num_workers": workers, "multiprocessing_context": _context(), "worker_init_fn": _start}


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["training.data.reader", "training.data.rows"]
    )  # imported once, then inherited
    return context


def _start(_: int) -> None:
    """Give a worker one thread; signals to the whole group, such as Ctrl-C, are the training process's to answer."""
    import cv2

    cv2.setNumThreads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(trainer: multiprocessing.process.BaseProcess) -> None:
    """End this process when the training one does, however that ends.

    PyTorch's own watch looks at the parent's number, which here is the fork server's, and that one lives as long as
    its workers.
    """
    trainer.join()
    os._exit(1)
