"""The load of benchmarks.serving: what is asked, always the same, and how it is sent."""

from __future__ import annotations

import base64
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.serving_policies import Baseline, Notes
from runtime import LocalControlPipeline
from runtime.control.png import png_bytes
from runtime.serve.engine import Engine
from runtime.serve.files import Files
from runtime.serve.limits import Limits
from runtime.serve.orders import Order, Orders
from runtime.serve.schema import Generate, RegionBody
from runtime.serve.work import Work

COLOURS, SHAPES = ("red", "blue", "green", "yellow"), ("star", "circle", "square", "triangle")
STEPS, SHORT = (4, 8, 15, 30), 8  # a request of up to 8 steps is a short one


def make_limits(rows: int, requests: int) -> Limits:
    """Return limits that refuse none of the requests, however long they wait."""
    return Limits(rows=rows, queue=requests, queue_mib=2**20, queued_seconds=1e6, running_seconds=1e6)


def make_orders(pipe: LocalControlPipeline, count: int) -> list[Order]:
    """Return the load: requests as clients send them, always the same ones; a request's seed is its number."""
    choose, limits, found = random.Random(0), Limits(), []
    with tempfile.TemporaryDirectory() as folder:
        orders = Orders(pipe.capabilities, Files(Path(folder), limits), limits)
        for number in range(count):
            words = [f"a {choose.choice(COLOURS)} {choose.choice(SHAPES)}" for _ in range(2)]
            body = Generate(
                prompt=" and ".join(words[: choose.randint(1, 2)]),
                steps=choose.choice(STEPS),
                guidance=5.0 if choose.random() < 0.75 else 1.0,
                seed=number,
            )
            if choose.random() < 0.5:
                body.regions = [make_region(choose, pipe.default_size)]
            found.append(orders.order(body))
    return found


def make_region(choose: random.Random, side: int) -> RegionBody:
    """Return a control: the outline of a disc somewhere, and as its mask a box around it."""
    radius = side * choose.uniform(0.15, 0.3)
    x, y = (choose.uniform(radius, side - radius) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    condition, mask = (Image.new("L", (side, side)) for _ in range(2))
    ImageDraw.Draw(condition).ellipse(box, outline=255)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    pictures = (base64.b64encode(png_bytes(image)).decode() for image in (condition, mask))
    return RegionBody(**dict(zip(("condition", "mask"), pictures, strict=True)))


@contextmanager
def running(policy: Engine | Baseline) -> Iterator[Engine | Baseline]:
    """Start a policy, wait until it is warm, stop it at the end."""
    policy.start()
    try:
        while not policy.warm:
            time.sleep(0.005)
        yield policy
    finally:
        policy.stop()


def closed(policy: Engine | Baseline, notes: Notes, orders: Sequence[Order], clients: int) -> None:
    """Send requests so that as many as there are clients are under way, until none is left."""
    for number, order in enumerate(orders):
        if number >= clients:
            notes.next_end()
        policy.submit(Work(order, ""))
    for _ in orders[-clients:]:
        notes.next_end()


def opened(policy: Engine | Baseline, notes: Notes, orders: Sequence[Order], rate: float, seed: int) -> None:
    """Send `rate` requests a second in the mean, at times that the seed says, whatever becomes of them."""
    gaps, due = random.Random(seed), time.monotonic()
    for order in orders:
        due += gaps.expovariate(rate)
        time.sleep(max(0.0, due - time.monotonic()))
        policy.submit(Work(order, "", created=due))
    for _ in orders:
        notes.next_end()
