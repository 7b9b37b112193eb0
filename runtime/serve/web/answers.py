"""What routes share: bodies read and parsed off the event loop, work waited for, events as a stream."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from runtime.serve.events import Event, Events
from runtime.serve.orders import parse
from runtime.serve.refusals import Refusal
from runtime.serve.service import Service
from runtime.serve.work import DISCONNECTED, Work

T = TypeVar("T")
PARSERS = 4  # bodies whose pictures are decoded at a time
WAITING = 8  # conditions that wait to be made
COMPONENTS = "#/components/schemas/{model}"
SSE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def service_of(request: Request) -> Service:
    return request.app.state.service


def owner_of(request: Request) -> tuple[str, bool]:
    """Return whose request it is, and whether there are several who may ask."""
    return request.state.owner, request.state.keyed


async def off_loop(request: Request, call: Callable[..., T], *arguments: Any) -> T:
    """Run on a thread, of which there are few, so that the event loop goes on."""
    context = contextvars.copy_context()
    return await run_sync(context.run, call, *arguments, limiter=request.app.state.parsers)


async def at_store(request: Request, call: Callable[..., T], *arguments: Any) -> T:
    """Run what reads or writes the disk on a thread; pictures that are decoded do not hold it up."""
    return await run_sync(call, *arguments, limiter=request.app.state.readers)


async def apart(request: Request, call: Callable[..., T]) -> T:
    """Run what takes seconds, one at a time. Raises Refusal where many wait for it."""
    state = request.app.state
    # Counted here, not by the limiter: several requests may pass before the first of them waits at it.
    if state.apart > WAITING:
        raise Refusal(429, "conditions: several are made; send it again later", retry_after=2)
    state.apart += 1
    try:
        return await run_sync(call, limiter=state.conditions)
    finally:
        state.apart -= 1


def ready(request: Request) -> Service:
    """Return the service. Raises Refusal where it takes no work."""
    service = service_of(request)
    if (why := service.not_ready) is not None:
        raise Refusal(503, f"server: {why}; send the request again", retry_after=2)
    return service


async def body_of(request: Request, model: type[BaseModel]) -> BaseModel:
    """Return the request's JSON. Raises Refusal: 415 for another type, and see `orders.parse`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"Content-Type {kind[:60]!r}: expected application/json", "Content-Type")
    raw = await request.body()
    body = await off_loop(request, parse, model, raw)
    said = request.state.said
    said |= {
        name: getattr(body, name) for name in ("prompt", "steps") if getattr(body, name, None) is not None
    }
    return body


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI entry of a route that reads its body itself."""
    schema = {"$ref": COMPONENTS.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def submitted(request: Request, body: BaseModel) -> Work:
    """Queue a request. Raises Refusal. One whose client goes meanwhile is not drawn, whatever cancels this call."""
    service = service_of(request)
    queued = asyncio.ensure_future(off_loop(request, service.submit, body, *owner_of(request)))

    def leave(done: asyncio.Future) -> None:
        if not done.cancelled() and done.exception() is None:
            stop(service, done.result())

    try:
        return await asyncio.shield(queued)
    except asyncio.CancelledError:
        queued.add_done_callback(leave)
        raise


async def wait_for(request: Request, service: Service, work: Work) -> None:
    """Wait for a work's end; where its client goes, so does the work. Raises Refusal where it has no picture."""

    async def watch(scope: anyio.CancelScope) -> None:
        with suppress(
            Exception
        ):  # a connection that cannot be read: what it raises is the server's that runs this
            while (await request.receive())["type"] != "http.disconnect":
                pass
        stop(service, work)
        scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch, group.cancel_scope)
            await work.ended()
            group.cancel_scope.cancel()
    finally:
        if (
            work.result is None and work.error is None
        ):  # the server has cancelled this call: it may do that, too
            stop(service, work)
    if work.result is None:
        raise work.error or Refusal(409, DISCONNECTED)


def stop(service: Service, work: Work) -> None:
    """Have a work end whose client has gone."""
    if work.stop("cancelled", DISCONNECTED):
        service.engine.wake()


def stream(
    events: Events,
    show: Callable[[Event], AsyncIterator[str]],
    after: int = 0,
    left: Callable[[], None] = lambda: None,
) -> Response:
    """Return events as server-sent ones.

    show: what is sent for one. left: called at the end, also where the client goes.
    """

    async def sent() -> AsyncIterator[str]:
        try:
            async for event in events.follow(after):
                if event is None:
                    yield ": still here\n\n"
                    continue
                async for text in show(event):
                    yield text
        finally:
            left()

    return StreamingResponse(sent(), media_type="text/event-stream", headers=SSE)


def sse(kind: str, data: dict[str, Any], number: int | None = None) -> str:
    """Return one server-sent event."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n"
