"""The routes: drawing at once, jobs, pictures, and the server's health."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from fastapi import FastAPI, Header, Path, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from runtime.control.png import png_bytes
from runtime.serve.capabilities import capabilities_of
from runtime.serve.events import LAST, Event
from runtime.serve.orders import collected
from runtime.serve.pictures import base64_of
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Condition, Generate, GenerateNow
from runtime.serve.store import Job, milliseconds, shown
from runtime.serve.web.answers import (
    apart,
    at_store,
    body_of,
    off_loop,
    owner_of,
    ready,
    service_of,
    sse,
    stop,
    stream,
    submitted,
    takes,
    wait_for,
)
from runtime.serve.work import Work

PNG = {200: {"content": {"image/png": {}}, "description": "a PNG"}}
EVENTS = {
    200: {"content": {"text/event-stream": {}}, "description": "events"},
    204: {"description": "it has ended, and all was sent"},
}
FILE = {200: {"content": {"application/octet-stream": {}}, "description": "the bytes that were sent"}}
PICTURE = {
    200: {
        "content": {"image/png": {}, "application/json": {}, "text/event-stream": {}},
        "description": "the picture; several, or with Accept: application/json, in JSON; with stream, events",
    }
}
BINARY = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
SAID = 300  # characters of a warning in a header, of up to 6 bytes each
JobId = Annotated[str, Path(max_length=64)]


def _warnings(said: list[str]) -> dict[str, str]:
    """Return the header that a picture's warnings come in, long ones cut: proxies refuse an answer for 4 KB of it."""
    short = [line if len(line) <= SAID else f"{line[:SAID]}..." for line in said]
    return {"X-Warnings": json.dumps(short)} if said else {}


def add_drawing(app: FastAPI) -> None:
    @app.post("/v1/generate", responses=PICTURE, openapi_extra=takes(GenerateNow))
    async def generate(request: Request) -> Response:
        """Draw, and answer with the picture, or with the events on the way to it."""
        service = ready(request)
        body: GenerateNow = await body_of(request, GenerateNow)
        work = await submitted(request, body)
        if body.stream:
            show = partial(_with_pictures, work)
            return stream(work.events, show, left=partial(stop, service, work))
        await wait_for(request, service, work)
        request.state.said |= {"work": work.id, "rows": work.rows, **work.result["timings"]}
        if len(work.pictures) > 1 or "application/json" in request.headers.get("accept", ""):
            return JSONResponse({**work.result, "pictures": [base64_of(data) for data in work.pictures]})
        about = {"X-Seed": str(work.result["seed"]), "X-Model-Hash": service.served.hash}
        about |= _warnings(work.result["warnings"])
        return Response(work.pictures[0], media_type="image/png", headers=about)

    async def _with_pictures(work: Work, event: Event) -> AsyncIterator[str]:
        data = event.data
        if event.kind == "done":
            data = {**data, "pictures": [base64_of(picture) for picture in work.pictures]}
        yield sse(event.kind, data, event.number)


def add_jobs(app: FastAPI) -> None:
    async def _job(request: Request, id: str) -> Job:
        service, (owner, _) = service_of(request), owner_of(request)
        return await at_store(request, service.job, id, owner)

    @app.post("/v1/jobs", status_code=202, openapi_extra=takes(Generate))
    async def submit(
        request: Request, idempotency_key: Annotated[str | None, Header(max_length=200)] = None
    ) -> JSONResponse:
        """Keep a job, which is drawn whether or not anybody waits. An Idempotency-Key makes it one job, sent twice."""
        service = ready(request)
        body = await body_of(request, Generate)
        key = idempotency_key or None  # an empty header is none
        job = await off_loop(request, service.submit_job, body, *owner_of(request), key)
        request.state.said |= {"job": job.id}
        return JSONResponse(shown(job), 202, {"Location": f"/v1/jobs/{job.id}"})

    @app.get("/v1/jobs/{id}")
    async def look(request: Request, id: JobId) -> JSONResponse:
        """Return a job's state; of one that is done its result and the addresses of its pictures."""
        return JSONResponse(shown(await _job(request, id)))

    @app.delete("/v1/jobs/{id}")
    async def remove(request: Request, id: JobId) -> JSONResponse:
        """Cancel a job that is open; forget one that has ended, with its pictures."""
        job = await _job(request, id)
        return JSONResponse(await at_store(request, service_of(request).cancel, job))

    @app.post("/v1/jobs/{id}/retry", status_code=202)
    async def retry(request: Request, id: JobId) -> JSONResponse:
        """Queue a job again that was interrupted or cancelled, or has failed."""
        service, job = ready(request), await _job(request, id)
        return JSONResponse(shown(await off_loop(request, service.again, job, owner_of(request)[1])), 202)

    @app.get("/v1/jobs/{id}/events", responses=EVENTS, response_class=Response)
    async def events(
        request: Request, id: JobId, last_event_id: Annotated[str | None, Header(max_length=20)] = None
    ) -> Response:
        """Return a job's events, server-sent, from after Last-Event-ID on; its end alone, if it was long since.

        204 where no other will come: a browser's EventSource then asks no more.
        """
        service, job = service_of(request), await _job(request, id)
        found = service.events_of(job)
        after = int(last_event_id) if (last_event_id or "").isdecimal() else 0
        if found is None:  # of before this process, or ended long since
            end = milliseconds(job.ended)
            if after == end:
                return Response(status_code=204)
            data = job.result if job.state == "done" else {"error": job.error}
            return Response(sse(job.state, data or {}, end), media_type="text/event-stream")
        last = found.last
        if last is not None and last.kind in LAST and after >= last.number:
            return Response(status_code=204)

        async def show(event: Event) -> AsyncIterator[str]:
            yield sse(event.kind, event.data, event.number)

        return stream(found, show, after)

    @app.get("/v1/jobs/{id}/images/{n}", responses=PNG, response_class=Response)
    async def image(request: Request, id: JobId, n: Annotated[int, Path(ge=0, le=1000)]) -> Response:
        """Return a picture of a job that is done."""
        job = await _job(request, id)
        data = await at_store(request, service_of(request).store.picture, job, n)
        return Response(data, media_type="image/png")


def add_pictures(app: FastAPI) -> None:
    @app.post("/v1/files", status_code=201, openapi_extra=BINARY)
    async def add_file(request: Request) -> JSONResponse:
        """Keep a picture's bytes, the body. Its id is their SHA-256; requests name it by that."""
        data = await request.body()
        if not data:
            raise Refusal(400, "body: empty; expected a picture's bytes", "body")
        name, image = await off_loop(request, service_of(request).files.add, data, "body", 415)
        about = {"id": name, "bytes": len(data), "width": image.width, "height": image.height}
        return JSONResponse(about, 201)

    @app.get("/v1/files/{id}", responses=FILE, response_class=Response)
    async def file(request: Request, id: Annotated[str, Path(pattern="^[0-9a-f]{64}$")]) -> Response:
        """Return a picture's bytes again."""
        _, data = await off_loop(request, service_of(request).files.read, id, "id")
        return Response(
            data, media_type="application/octet-stream", headers={"Cache-Control": "private, immutable"}
        )

    @app.post("/v1/conditions", responses=PNG, response_class=Response, openapi_extra=takes(Condition))
    async def condition(request: Request) -> Response:
        """Return a photo's edges, sketch ... as a run would compute them."""
        service, body = ready(request), await body_of(request, Condition)

        def make() -> tuple[bytes, list[str]]:
            with collected() as said:
                return png_bytes(service.orders.condition(body)), said

        data, said = await apart(request, make)
        return Response(data, media_type="image/png", headers=_warnings(said))

    @app.get("/v1/capabilities")
    async def capabilities(request: Request) -> JSONResponse:
        """Return what can be asked for: sizes, adapters, schedulers, presets, limits."""
        service = service_of(request)
        return JSONResponse(capabilities_of(service.served, service.orders, service.limits))


def add_health(app: FastAPI) -> None:
    """Add what load balancers ask, by GET or by HEAD."""

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthy(request: Request) -> PlainTextResponse:
        """Say that the process is sound: it answers, and the engine's thread is alive."""
        if not service_of(request).engine.alive:
            raise Refusal(503, "server: the engine's thread has ended")
        return PlainTextResponse("ok\n")

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", response_class=PlainTextResponse)
    async def is_ready(request: Request) -> PlainTextResponse:
        """Say whether work is taken: loaded, warmed up, the engine's thread alive, and not ending."""
        service = ready(request)
        if service.engine.draining:
            raise Refusal(503, "server: it is ending", retry_after=5)
        return PlainTextResponse("ready\n")

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> PlainTextResponse:
        text = service_of(request).metrics.text()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")
