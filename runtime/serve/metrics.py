"""The server's numbers, as Prometheus reads them."""

from __future__ import annotations

import os
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Metrics:
    """One server's: a registry of its own, so that several may be in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "localcontrol"}
        self.requests = Counter("requests", "answers by route and code", ["route", "code"], **own)
        self.request_seconds = Histogram(
            "request_seconds", "from a request's head to its answer's end", ["route"], buckets=SECONDS, **own
        )
        self.stage_seconds = Histogram(
            "stage_seconds", "of a picture's stages", ["stage"], buckets=SECONDS, **own
        )
        self.tick_rows = Histogram("tick_rows", "rows of the UNet in a step", buckets=ROWS, **own)
        self.tick_seconds = Histogram("tick_seconds", "of a step of all that run", buckets=SECONDS, **own)
        self.steps = Counter("steps", "denoising steps of requests", **own)
        self.images = Counter("images", "pictures drawn", **own)
        self.ended = Counter("ended", "requests by how they ended", ["state"], **own)
        self.rejected = Counter("rejected", "requests that were refused, by code", ["code"], **own)
        self._own = own

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Add a number that is read when it is asked for."""
        Gauge(name, about, **self._own).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def resident_bytes() -> float:
    """Return the process's memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        return 0.0
