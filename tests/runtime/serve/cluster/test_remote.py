"""runtime.serve.cluster.remote: what is lost is sent once more, what is stopped ends, what has no room is refused."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError
from ray.serve.exceptions import BackPressureError

from runtime.sampling.request import Request
from runtime.serve.cluster.remote import RemoteEngine
from runtime.serve.limits import Limits
from runtime.serve.orders import Order
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Generate
from runtime.serve.work import Work
from tests.support.server import wait_until

DONE = ("done", {"pictures": [b"png"], "result": {"seed": 3}})
DRAWN = [("queued", {"position": 0}), ("started", {}), ("step", {"step": 1, "steps": 2}), DONE]


class Replicas:
    """A handle whose calls go as they are told: each a list of events, an exception among them."""

    def __init__(self, *calls):
        self.calls, self.sent, self.cancelled = list(calls), [], 0
        self.draw = SimpleNamespace(remote=self.remote)

    def options(self, stream):
        assert stream
        return self

    def remote(self, order, id, previews, followed):
        self.sent.append((id, order.request.seed))
        return Call(self, self.calls.pop(0))


class Call:
    def __init__(self, replicas, events):
        self.replicas, self.events = replicas, iter(events)

    def __aiter__(self):
        return self

    async def __anext__(self):
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            if event == "wait":
                await asyncio.sleep(60)
            return event
        raise StopAsyncIteration

    def cancel(self):
        self.replicas.cancelled += 1


class Notes:
    """Hears of works."""

    def __init__(self):
        self.ends, self.steps = {}, []

    def started(self, work): ...

    def stepped(self, work, step, steps):
        self.steps.append((work, step))

    def finished(self, work, pictures, result):
        self.ends[work] = "done", pictures

    def ended(self, work, state, error):
        self.ends[work] = state, error


@pytest.fixture
def engine():
    """A function that makes an engine on an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def make(*calls, **limits):
        made = RemoteEngine(Replicas(*calls), Limits(**limits), Notes())

        async def start():
            made.start()

        asyncio.run_coroutine_threadsafe(start(), loop).result()
        return made, made.hearer, made.replicas

    yield make
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def work(session=None, seed=None):
    return Work(Order(Generate(prompt="a"), Request("a", seed=seed), [], None, [], 10), "", session)


def end_of(notes, each):
    wait_until(lambda: each in notes.ends)
    return notes.ends[each]


GONE = (
    ActorDiedError(),
    ActorUnavailableError("gone", None),
    OutOfMemoryError("killed"),
    asyncio.CancelledError(),
)


@pytest.mark.parametrize("lost", [*GONE, ("interrupted", {})])
def test_what_is_lost_is_sent_once_more_with_its_seed(engine, lost):
    made, notes, replicas = engine([*DRAWN[:3], lost], DRAWN)
    one = work()
    made.submit(one)
    assert end_of(notes, one) == ("done", [b"png"])
    assert replicas.sent[0] == replicas.sent[1] and replicas.sent[0][1] is not None
    assert len(notes.steps) == 2


def test_what_is_lost_twice_is_told_so(engine):
    made, notes, replicas = engine([ActorDiedError()], [ActorDiedError()])
    one = work()
    made.submit(one)
    state, error = end_of(notes, one)
    assert state == "interrupted" and error.status == 503 and error.retry_after and len(replicas.sent) == 2


def test_what_is_done_is_not_drawn_again_whatever_becomes_of_its_stream(engine):
    made, notes, replicas = engine([*DRAWN, ActorDiedError()])
    one = work()
    made.submit(one)
    assert end_of(notes, one)[0] == "done"
    one.stop("cancelled", "the client has gone")  # as a stream does at its end
    made.wake()
    wait_until(lambda: not made._open)
    assert end_of(notes, one)[0] == "done" and len(replicas.sent) == 1


def test_what_was_lost_waits_no_longer_than_others(engine):
    made, notes, _ = engine([*DRAWN[:2], ActorDiedError()], ["wait"], queued_seconds=0.3)
    one = work()
    made.submit(one)
    state, error = end_of(notes, one)
    assert state == "failed" and error.status == 504


def test_what_a_replica_refuses_is_not_sent_again(engine):
    made, notes, replicas = engine([("failed", {"error": Refusal(422, "steps 0: expected more", "steps")})])
    one = work()
    made.submit(one)
    state, error = end_of(notes, one)
    assert (state, error.status, error.field) == ("failed", 422, "steps") and len(replicas.sent) == 1


def test_replicas_without_room_are_a_429(engine):
    made, notes, _ = engine([BackPressureError(num_queued_requests=1, max_queued_requests=1)])
    one = work()
    made.submit(one)
    state, error = end_of(notes, one)
    assert state == "failed" and error.status == 429 and error.retry_after


def test_what_is_stopped_ends_and_its_replica_hears_of_it(engine):
    made, notes, replicas = engine([*DRAWN[:2], "wait"])
    one = work()
    made.submit(one)
    wait_until(lambda: one.started is not None)
    one.stop("cancelled", "the client has gone")
    made.wake()
    assert end_of(notes, one)[0] == "cancelled" and replicas.cancelled == 1
    wait_until(lambda: not made.depth and not made._open)


def test_a_newer_one_of_its_session_takes_its_place(engine):
    made, notes, _ = engine(["wait"], DRAWN)
    older, newer = work("s"), work("s")
    made.submit(older)
    made.submit(newer)
    assert end_of(notes, older)[0] == "cancelled" and end_of(notes, newer)[0] == "done"


def test_what_waits_is_bounded_in_number_and_in_time(engine):
    made, notes, _ = engine(["wait"], ["wait"], queue=2, queued_seconds=0.3)
    works = [work(), work()]
    for each in works:
        made.submit(each)
    with pytest.raises(Refusal) as refused:
        made.submit(work())
    assert refused.value.status == 429
    for each in works:
        state, error = end_of(notes, each)
        assert state == "failed" and error.status == 504


def test_its_end_ends_all(engine):
    made, notes, _ = engine([*DRAWN[:2], "wait"], ["wait"])
    works = [work(), work()]
    for each in works:
        made.submit(each)
    wait_until(lambda: works[0].started is not None)
    start = time.monotonic()
    made.close()
    assert time.monotonic() - start < 5
    assert [end_of(notes, each)[0] for each in works] == ["interrupted", "interrupted"]
    with pytest.raises(Refusal):
        made.submit(work())
