"""runtime.serve.events: told to any number, from any event on, and not more than is kept."""

import asyncio
import threading

from runtime.serve.events import Events


def read(events, after=0, keepalive=5.0):
    async def go():
        return [event async for event in events.follow(after, keepalive)]

    return asyncio.run(go())


def test_read_again_from_any_on():
    events = Events()
    for kind in ("queued", "step", "done"):
        events.publish(kind, about=kind)
    assert [(e.number, e.kind, e.data) for e in read(events)] == [
        (1, "queued", {"about": "queued"}), (2, "step", {"about": "step"}), (3, "done", {"about": "done"})
    ]  # fmt: skip
    assert [e.number for e in read(events, after=2)] == [3]
    assert events.last.kind == "done"


def test_they_go_on_from_a_number():
    events = Events(40)
    for kind in ("queued", "done"):
        events.publish(kind)
    assert [event.number for event in read(events, 2)] == [41, 42]


def test_nothing_comes_after_the_last():
    events = Events()
    events.publish("failed")
    events.publish("done")
    assert [e.kind for e in read(events)] == ["failed"]


def test_of_previews_only_the_newest_is_kept():
    events = Events()
    for step in range(100):
        events.publish("preview", step=step)
    events.publish("done")
    assert [(e.number, e.data.get("step")) for e in read(events)] == [(100, 99), (101, None)]


def test_told_as_it_happens_from_another_thread():
    events = Events()

    async def go():
        threading.Timer(0.05, lambda: [events.publish(kind) for kind in ("step", "done")]).start()
        return [e.kind async for e in events.follow()]

    assert asyncio.run(go()) == ["step", "done"]
    assert not events._waiting


def test_a_quiet_time_is_shown():
    events = Events()

    async def go():
        found = []
        async for event in events.follow(keepalive=0.02):
            found.append(event)
            if len(found) == 2:
                events.publish("done")
        return found

    quiet = asyncio.run(go())
    assert quiet[:2] == [None, None] and quiet[-1].kind == "done"
