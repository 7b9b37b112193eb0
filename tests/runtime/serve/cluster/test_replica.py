"""runtime.serve.cluster.replica: a replica without Ray around it."""

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from runtime.sampling.request import Request
from runtime.serve.cluster.replica import EVERY, Replica
from runtime.serve.limits import Limits
from runtime.serve.options import make_parser
from runtime.serve.orders import Order
from runtime.serve.schema import Generate
from tests.support.server import pipe, wait_until


@pytest.fixture
def replica(monkeypatch):
    monkeypatch.setattr("runtime.serve.cluster.replica.load", lambda options: pipe())
    made = Replica(make_parser().parse_args([]), Limits(rows=4))
    yield made
    made.engine.close()


def order(steps=3, **body):
    made = Request("a", steps=steps, seed=3, height=64, width=64)
    return Order(Generate(prompt="a", steps=steps, **body), made, [], None, [], 10)


async def events_of(replica, made, followed, most=None):
    found, stream = [], replica.draw(made, "id", False, followed)
    async for event in stream:
        found.append(event)
        if len(found) == most:
            await stream.aclose()  # as where its caller goes away
            break
    return found


def test_a_picture_comes_with_what_its_caller_wants_to_hear(replica):
    found = asyncio.run(events_of(replica, order(deterministic=True), followed=False))
    assert [kind for kind, _ in found] == ["started", "done"]
    done = found[-1][1]
    alone = pipe()("a", steps=3, seed=3, height=64, width=64).images[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(done["pictures"][0]))), np.asarray(alone))
    assert done["result"]["seed"] == 3


def test_steps_are_told_now_and_then(replica):
    found = asyncio.run(events_of(replica, order(steps=40), followed=True))
    steps = [data["step"] for kind, data in found if kind == "step"]
    seconds = found[-1][1]["result"]["timings"]["running"]
    assert steps[0] == 1 and steps == sorted(set(steps)) and len(steps) <= 2 + seconds / EVERY


def test_who_goes_away_frees_the_rows(replica):
    found = asyncio.run(events_of(replica, order(steps=1000), followed=True, most=2))
    assert len(found) == 2
    wait_until(lambda: not replica.engine.busy)


def test_a_thread_that_ends_or_hangs_is_no_sound_replica(replica):
    replica.check_health()
    replica.limits = Limits(running_seconds=0.001)
    replica.engine.beat -= 10
    replica.engine.stop()
    with pytest.raises(RuntimeError, match="ended"):
        replica.check_health()
    replica.engine = type(
        "Engine", (), {"alive": True, "beat": replica.engine.beat - 10, "close": lambda self: None}
    )()
    with pytest.raises(RuntimeError, match="hangs"):
        replica.check_health()


def test_what_an_ended_engine_is_sent_goes_to_another(replica):
    replica.engine.stop()
    left = []
    replica.leave = left.append
    ((kind, data),) = asyncio.run(events_of(replica, order(), followed=False))
    assert kind == "interrupted" and data["error"].status == 503 and left == [1]
    assert asyncio.run(replica.describe()).rows == 4
