"""runtime.serve.engine: who joins when, who waits, and what becomes of one that fails."""

import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from runtime.errors import InputError
from runtime.sampling.request import Request
from runtime.serve import engine as engine_module
from runtime.serve.engine import Engine
from runtime.serve.limits import Limits
from runtime.serve.orders import Order
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Generate
from runtime.serve.work import Work
from tests.support.server import pipe, wait_until


@dataclass
class Notes:
    """A watcher that remembers."""

    order: list = field(default_factory=list)
    drawn_works: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def started(self, work):
        self.order.append(work)

    def stepped(self, work, progress):
        self.gate.wait(20)

    def drawn(self, work, drawn):
        self.drawn_works[work] = drawn

    def ended(self, work, state, error):
        self.states[work] = state, error

    def ticked(self, rows, seconds):
        self.rows.append(rows)


def work(steps=3, images=1, side=64, owner="", session=None, size=1000, **body):
    body = Generate(prompt="a", images=images, steps=steps, **body)
    request = Request("a", steps=steps, seed=3, images_per_prompt=images, height=side, width=side)
    return Work(Order(body, request, [], None, [], size), owner, session)


@pytest.fixture
def started(request):
    """A function that starts an engine with limits; its watcher's gate is open unless asked."""
    engines = []

    def start(on=None, open_gate=True, **limits):
        notes = Notes()
        if open_gate:
            notes.gate.set()
        made = Engine(on or pipe(), Limits(**limits), notes)
        made.start()
        engines.append((made, notes))
        wait_until(lambda: made.warm)
        return made, notes

    yield start
    for made, notes in engines:
        notes.gate.set()
        made.stop()
        assert not made.alive


def latents(notes, work):
    return notes.drawn_works[work].result.latents


def test_requests_join_between_steps_and_are_drawn_as_alone(started):
    engine, notes = started()
    works = [work(steps=5), work(steps=3, images=2), work(steps=8)]
    for each in works:
        engine.submit(each)
        time.sleep(0.01)
    wait_until(lambda: len(notes.drawn_works) == 3)
    assert max(notes.rows) > 2
    for each in works:
        alone = pipe().draw(each.order.request).latents
        assert (latents(notes, each) - alone).abs().max() / alone.abs().max() < 1e-4


def test_what_is_deterministic_shares_no_call(started):
    engine, notes = started(open_gate=False)
    works = [work(deterministic=True), work(), work()]
    for each in works:
        engine.submit(each)
    notes.gate.set()
    wait_until(lambda: len(notes.drawn_works) == 3)
    assert torch.equal(latents(notes, works[0]), pipe().draw(works[0].order.request).latents)


def test_rows_are_bounded(started):
    engine, notes = started(rows=4, open_gate=False)
    works = [work() for _ in range(5)]
    for each in works:
        engine.submit(each)
    notes.gate.set()
    wait_until(lambda: len(notes.drawn_works) == 5)
    assert notes.order == works and max(notes.rows) == 4


def test_one_larger_than_the_bound_runs_alone(started):
    engine, notes = started(rows=4)
    big = work(images=4)
    engine.submit(big)
    wait_until(lambda: big in notes.drawn_works)
    assert max(notes.rows) == 8


def test_small_ones_pass_a_large_one_only_for_a_while(started):
    """Eight rows wait for room while others come and go in turn: first they are passed, then nobody passes."""
    engine, notes = started(rows=8, patience=1.0)
    waiting = [work(steps=30) for _ in range(3)]
    for each in waiting:
        engine.submit(each)
    wait_until(lambda: len(notes.order) == 3)
    big = work(images=4)
    engine.submit(big)
    later, end = [], time.monotonic() + 30
    while big not in notes.order:
        assert time.monotonic() < end
        if engine.depth < 3:
            later.append(work(steps=10))
            engine.submit(later[-1])
        time.sleep(0.005)
    passed = [each for each in notes.order[: notes.order.index(big)] if each in later]
    assert passed and all(each.created - big.created < 1.0 + 0.1 for each in passed)
    for each in later:
        each.stop("cancelled", "")


def test_sizes_share_the_engine(started):
    engine, notes = started()
    works = [work(side=64, steps=6), work(side=96, steps=6), work(side=64, steps=6)]
    for each in works:
        engine.submit(each)
    wait_until(lambda: len(notes.drawn_works) == 3)
    for each in works:
        alone = pipe().draw(each.order.request).latents
        assert (latents(notes, each) - alone).abs().max() / alone.abs().max() < 1e-4


def test_a_cancelled_one_frees_its_rows_after_one_step(started):
    engine, notes = started()
    long = work(steps=100)
    engine.submit(long)
    wait_until(lambda: long.steps_done > 2)
    long.stop("cancelled", "no more")
    engine.wake()
    at = long.steps_done
    wait_until(lambda: long in notes.states)
    assert long.steps_done <= at + 1 and not engine.busy
    state, error = notes.states[long]
    assert state == "cancelled" and str(error) == "no more"


def test_a_newer_one_of_a_session_takes_the_older_ones_place(started):
    engine, notes = started()
    old, other = work(steps=100, session="s", owner="a"), work(steps=100, session="s", owner="b")
    engine.submit(old)
    engine.submit(other)
    wait_until(lambda: other.steps_done > 1)
    new = work(session="s", owner="a")
    engine.submit(new)
    wait_until(lambda: new in notes.drawn_works)
    assert notes.states[old][0] == "cancelled" and other not in notes.states
    other.stop("cancelled", "")


def test_a_session_has_room_in_a_full_queue_for_its_newer_request(started):
    engine, notes = started(queue=2, rows=2, open_gate=False)
    for each in (work(), work(session="s", owner="a"), work()):
        engine.submit(each)
        wait_until(lambda: notes.order)
    assert "2 requests wait" in str(refused(engine, work()))
    engine.submit(work(session="s", owner="a"))
    notes.gate.set()
    wait_until(lambda: len(notes.drawn_works) == 3)


def refused(engine, each, keyed=False):
    with pytest.raises(Refusal) as caught:
        engine.submit(each, keyed)
    return caught.value


def test_the_queue_is_bounded(started):
    engine, notes = started(queue=3, queue_per_key=2, rows=2, queue_mib=1, open_gate=False)
    engine.submit(work(owner="a"))
    wait_until(lambda: notes.order)
    engine.submit(work(owner="a"), keyed=True)
    engine.submit(work(owner="a"), keyed=True)
    full = refused(engine, work(owner="a"), keyed=True)
    assert (full.status, full.headers) == (429, {"Retry-After": "2"}) and "2 requests of this key" in str(
        full
    )
    assert "fill the memory" in str(refused(engine, work(owner="b", size=2**20)))
    engine.submit(work(owner="b"), keyed=True)
    assert "3 requests wait" in str(refused(engine, work(owner="c")))
    notes.gate.set()
    wait_until(lambda: len(notes.drawn_works) == 4)


def test_time_in_the_queue_and_at_work_is_bounded(started):
    engine, notes = started(queued_seconds=0.2, running_seconds=0.6, rows=2)
    long, waits = work(steps=1000), work()
    engine.submit(long)
    engine.submit(waits)
    wait_until(lambda: len(notes.states) == 2)
    assert [notes.states[each][0] for each in (waits, long)] == ["failed", "failed"]
    assert [notes.states[each][1].status for each in (waits, long)] == [504, 504]
    assert "waited for more than 0.2 s" in str(notes.states[waits][1])


def test_drained_it_ends_what_runs_and_takes_no_more(started):
    engine, notes = started(rows=2)
    runs, waits = work(steps=20), work()
    engine.submit(runs)
    wait_until(lambda: notes.order)
    engine.submit(waits)
    engine.drain()
    assert refused(engine, work()).status == 503
    wait_until(lambda: runs in notes.drawn_works)
    assert notes.states[waits][0] == "interrupted"


def test_stopped_it_interrupts_what_runs(started):
    engine, notes = started()
    runs = work(steps=1000)
    engine.submit(runs)
    wait_until(lambda: runs.steps_done)
    engine.stop()
    assert notes.states[runs][0] == "interrupted" and not engine.alive


def test_what_fails_with_others_is_tried_alone(started, monkeypatch):
    """A call of three requests that one of them breaks: the two others are drawn."""
    engine, notes = started(open_gate=False)
    works = [work(steps=4) for _ in range(3)]
    bad = works[1]
    tick = engine_module.Batch.tick

    def broken(self, runs):
        if any(active.run in runs for active in engine._active if active.work is bad):
            raise RuntimeError("out of memory")
        return tick(self, runs)

    monkeypatch.setattr(engine_module.Batch, "tick", broken)
    for each in works:
        engine.submit(each)
    notes.gate.set()
    wait_until(lambda: len(notes.drawn_works) == 2 and notes.states)
    state, error = notes.states[bad]
    assert state == "failed" and error.status == 500 and "RuntimeError" in str(error)


@pytest.mark.parametrize("part", ["_schedule", "_encode_text", "_make_images"])
def test_what_cannot_be_prepared_or_decoded_fails_alone(started, monkeypatch, part):
    engine, notes = started()
    bad, good = work(), work()
    whole = getattr(engine_module.Drawing, part)

    def broken(self, *arguments):
        if self.request is bad.order.request:
            raise InputError("scheduler: of no use") if part == "_schedule" else RuntimeError("broken")
        return whole(self, *arguments)

    monkeypatch.setattr(engine_module.Drawing, part, broken)
    engine.submit(bad)
    engine.submit(good)
    wait_until(lambda: good in notes.drawn_works and bad in notes.states)
    error = notes.states[bad][1]
    assert (error.status, error.field) == ((422, "scheduler") if part == "_schedule" else (500, None))
    assert engine.alive and not engine.busy


def test_ages_are_looked_at_while_others_run(started):
    engine, notes = started(rows=2, queued_seconds=0.3)
    long, waits = work(steps=300), work()
    engine.submit(long)
    engine.submit(waits)
    wait_until(lambda: waits in notes.states)
    assert long not in notes.states
    long.stop("cancelled", "")
    engine.wake()


def test_a_size_that_fails_leaves_the_others_at_their_step(started, monkeypatch):
    """Sizes are stepped one after the other: where a later one fails, none takes a step beyond its last."""
    engine, notes = started(open_gate=False)
    good, bad = work(side=64, steps=4), work(side=96, steps=8)
    joint = type(pipe().denoiser.joint())
    call = joint.__call__

    def broken(self, parts):
        size, at = parts[0].sample.shape[-1], {active.work: active.run for active in engine._active}
        if good in at and at[good].done and size != at[good].latents.shape[-1]:
            raise RuntimeError("out of memory")
        return call(self, parts)

    monkeypatch.setattr(joint, "__call__", broken)
    engine.submit(good)
    engine.submit(bad)
    notes.gate.set()
    wait_until(lambda: {good, bad} == {*notes.drawn_works, *notes.states})
    assert notes.states.keys() == {bad}
    assert torch.equal(latents(notes, good), pipe().draw(good.order.request).latents)


def test_what_was_replaced_holds_no_memory_during_a_long_step(started):
    engine, notes = started(rows=2, open_gate=False)
    engine.submit(work())
    wait_until(lambda: notes.order)
    waiting = [work(session="s") for _ in range(5)]
    for each in waiting:
        engine.submit(each)
    assert engine.depth == 1 and notes.states.keys() == {*waiting[:-1]}
    waiting[-1].stop("cancelled", "no more")
    engine.submit(work())
    assert engine.depth == 1 and notes.states[waiting[-1]][0] == "cancelled"
    notes.gate.set()
    wait_until(lambda: len(notes.drawn_works) == 2)
    assert len(notes.states) == 5
