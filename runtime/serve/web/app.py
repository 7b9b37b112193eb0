"""The application that the routes make, with its documents and the page."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

import kernels
from runtime.serve.orders import heard
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Condition, Generate, GenerateNow, ImagesGenerations
from runtime.serve.service import Service
from runtime.serve.web import docs, openai
from runtime.serve.web.answers import (
    COMPONENTS,
    PARSERS,
)
from runtime.serve.web.guard import Access, Guard, refused
from runtime.serve.web.routes import add_drawing, add_health, add_jobs, add_pictures

log = logging.getLogger("runtime.serve")
PAGE = files("runtime.serve") / "page"
CLEAN = 600.0  # seconds
TEXT = {"type": "string"}
ERROR = {  # what every refusal is: see `Refusal.body`
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT,
                "type": TEXT,
                "param": {"anyOf": [TEXT, {"type": "null"}]},
                "code": TEXT,
            },
        }
    },
}


class Page(StaticFiles):
    """Files of the page, which a browser asks for again once they have changed."""

    def file_response(self, *arguments, **options) -> Response:
        answer = super().file_response(*arguments, **options)
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def make_app(service: Service, access: Access | None = None, log_prompts: bool = False) -> FastAPI:
    """Return the application; the service starts and ends with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.parsers, app.state.readers = anyio.CapacityLimiter(PARSERS), anyio.CapacityLimiter(PARSERS)
        app.state.conditions, app.state.apart = anyio.CapacityLimiter(1), 0
        with heard():
            service.start()
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(keep_clean, service)
                    yield
                    group.cancel_scope.cancel()
            finally:
                await anyio.to_thread.run_sync(service.close)

    app = FastAPI(
        title="localcontrol",
        version=kernels.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page fetches its scripts from another host
        redoc_url=None,
        description="Text-to-image with controls that act only inside painted regions.",
    )
    app.state.service = service
    routes = (add_drawing, add_jobs, add_pictures, openai.add_routes, add_health, add_docs, add_page)
    for add in routes:
        add(app)
    app.add_middleware(
        Guard,
        access=access or Access(),
        limits=service.limits,
        metrics=service.metrics,
        log_prompts=log_prompts,
    )
    app.add_exception_handler(Refusal, lambda request, error: refused(error))
    app.add_exception_handler(HTTPException, _refused_by_framework)
    app.add_exception_handler(RequestValidationError, _refused_by_parameters)
    app.openapi = lambda: document(app)
    return app


async def keep_clean(service: Service) -> None:
    """Remove what is too old, now and then, also where nothing new comes."""
    while True:
        await anyio.sleep(CLEAN)
        try:
            await anyio.to_thread.run_sync(service.clean)
        except Exception as error:  # a full disk, a locked table: the next time may do
            log.error("cleaning", exc_info=error)


def _refused_by_framework(request: Request, error: HTTPException) -> JSONResponse:
    said = {404: f"{request.url.path[:80]}: no such route", 405: f"{request.method}: not for this route"}
    answer = refused(Refusal(error.status_code, said.get(error.status_code, str(error.detail))))
    answer.headers.update(error.headers or {})
    return answer


def _refused_by_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return refused(Refusal(422, f"{field}: {first['msg']}", field))


def document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, with the bodies that routes read themselves."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for model in (GenerateNow, Generate, Condition, ImagesGenerations):
            schema = model.model_json_schema(ref_template=COMPONENTS)
            schemas |= schema.pop("$defs", {})
            schemas[model.__name__] = schema
        _say_errors(made, schemas)
        app.openapi_schema = made
    return app.openapi_schema


def _say_errors(made: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Put our errors in a document, in the place of FastAPI's, whose shape is another."""
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR
    content = {"application/json": {"schema": {"$ref": COMPONENTS.format(model="Error")}}}
    for methods in made["paths"].values():
        for about in methods.values():
            about["responses"].pop("422", None)
            about["responses"]["default"] = {"description": "an error, in one line", "content": content}


def add_docs(app: FastAPI) -> None:
    """Add the page of the routes at /docs."""

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def read_docs() -> HTMLResponse:
        return HTMLResponse(docs.page(document(app)))

    @app.get("/docs/style.css", include_in_schema=False)
    async def style() -> Response:
        return Response(docs.STYLE, media_type="text/css")


def add_page(app: FastAPI) -> None:
    """Add the page at /; its files by their names, so that it hides no route."""

    def add(path: str, name: str) -> None:
        @app.head(path, include_in_schema=False)
        @app.get(path, include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(str(PAGE / name), headers={"Cache-Control": "no-cache"})

    for path, name in (("/", "index.html"), ("/style.css", "style.css"), ("/icon.svg", "icon.svg")):
        add(path, name)
    app.mount("/js", Page(directory=str(PAGE / "js")), name="page")
