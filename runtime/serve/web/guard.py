"""What stands before every route: who may ask, how much may be sent, what is counted and logged."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.machine.files import reason_of
from runtime.serve.limits import MIB, Limits
from runtime.serve.metrics import Metrics
from runtime.serve.refusals import Refusal

log = logging.getLogger("runtime.serve.requests")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/healthz", "/readyz")  # asked for by whatever watches a server, without a key
PAGE = ("/", "/style.css", "/icon.svg")  # and /js: the page, which asks for a key itself
SWALLOW = 2.0  # seconds for which a body that is too large is read on
NOBODY = ""  # the owner of what is asked without keys
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

ALLOWED = {  # to pages of the sites of --allow-origin
    "Allow-Methods": "GET, POST, DELETE",
    "Allow-Headers": "Authorization, Content-Type, Idempotency-Key, Last-Event-ID",
    "Expose-Headers": "X-Seed, X-Model-Hash, X-Warnings, X-Request-Id, Location, Retry-After",
    "Max-Age": "600",
}


@dataclass(frozen=True)
class Access:
    """Who may ask. keys: without any, everyone who reaches the server. hosts: names it is called by, none for any.

    origins: of pages of other servers that may use it.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] = LOOPBACK
    origins: Sequence[str] = ()

    def check(self, path: str, headers: Headers, method: str = "GET") -> str:
        """Return whose request it is: a hash of the key. Raises Refusal."""
        host = headers.get("host", "")
        if path in OPEN:
            return NOBODY
        if self.hosts and name_of(host) not in self.hosts:
            raise Refusal(
                400, f"Host {host[:80]!r}: expected {', '.join(self.hosts)}; see --allow-host", "Host"
            )
        origin = headers.get("origin")
        if origin is not None and _site(origin) != host and origin not in self.origins:
            raise Refusal(403, f"Origin {origin[:80]!r}: another site; see --allow-origin", "Origin")
        of_page = path in PAGE or path.startswith("/js/")
        if not self.keys or of_page or (method == "OPTIONS" and origin in self.origins):
            return NOBODY
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = [_is_key(given.strip(" \t"), key) for key in self.keys]
        if scheme.lower() != "bearer" or not any(same):
            raise Refusal(
                401, "Authorization: expected 'Bearer' and an API key of this server", "Authorization"
            )
        return hashlib.sha256(self.keys[same.index(True)].encode()).hexdigest()[:16]


def _site(origin: str) -> str | None:
    """Return an Origin header's host and port; None where it is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_key(given: str, key: str) -> bool:
    """Return whether a header's text, which was read as Latin-1, is a key, sent as UTF-8 or as Latin-1."""
    sent = given.encode("latin-1"), given.encode()
    return any(hmac.compare_digest(each, key.encode()) for each in sent)


def name_of(host: str) -> str:
    """Return a Host header's name, without its port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


class Guard:
    """ASGI middleware: checks a request's head, counts its body, and notes its end."""

    def __init__(
        self, app: ASGIApp, access: Access, limits: Limits, metrics: Metrics, log_prompts: bool = False
    ):
        self.app, self.access, self.limits, self.metrics = app, access, limits, metrics
        self.log_prompts, self.open = log_prompts, Counter()  # requests that are answered, by their owners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await Exchange(self, scope, receive, send).run()


class Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send):
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.id, self.start = secrets.token_hex(8), time.perf_counter()
        self.status, self.received, self.sent, self.whole = 0, 0, 0, False
        self.counted: str | None = None  # as whose request
        self.allowed: str | None = None  # another site, whose pages may read the answer
        scope["state"] = {**scope.get("state", {}), "said": {}}

    async def run(self) -> None:
        headers = Headers(scope=self.scope)
        if headers.get("origin") in self.guard.access.origins:
            self.allowed = headers["origin"]
        try:
            owner = self.guard.access.check(self.scope["path"], headers, self.scope["method"])
            self.scope["state"] |= {"owner": owner, "keyed": len(self.guard.access.keys) > 1}
            await self._check_length(headers)
            self._check_number(owner)
            if self.allowed and self.scope["method"] == "OPTIONS":
                await Response(status_code=204)(self.scope, self._receive, self.send)
                return
            await self.guard.app(self.scope, self.receive, self.send)
        except Refusal as error:
            if self.status == 0:
                await refused(error)(self.scope, self._receive, self.send)
        except ClientDisconnect:
            pass  # within its body: nobody is there to be answered, and nothing of ours is wrong
        except Exception as error:
            logging.getLogger("runtime.serve").error("%s %s", self.id, self.scope["path"], exc_info=error)
            if self.status == 0:
                said = Refusal(500, f"server: {_fault(error)}; its log says more")
                await refused(said)(self.scope, self._receive, self.send)
        finally:
            if self.counted is not None:
                self.guard.open[self.counted] -= 1
            self._note()

    def _check_number(self, owner: str) -> None:
        """Raise Refusal where too many are answered at a time; of one key at most half of them."""
        most, opened = self.guard.limits.connections, self.guard.open
        if self.scope["path"] in OPEN:
            return
        if opened.total() >= most or (len(self.guard.access.keys) > 1 and opened[owner] >= most / 2):
            raise Refusal(503, f"server: {opened.total()} requests at a time; come again", retry_after=2)
        opened[owner] += 1
        self.counted = owner

    async def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.guard.limits.body_mib * MIB:
            await self._refuse_body()

    async def _refuse_body(self) -> None:
        """Raise Refusal, after reading on for a while: a client that is still sending would not see the answer."""
        until, most = time.perf_counter() + SWALLOW, 4 * self.guard.limits.body_mib * MIB
        while not self.whole and self.received < most and (left := until - time.perf_counter()) > 0:
            with anyio.move_on_after(left):
                message = await self._receive()
                self.received += len(message.get("body", b""))
                self.whole = not message.get("more_body", False)
        raise Refusal(413, f"body: more than {self.guard.limits.body_mib} MiB; expected less", "body")

    async def receive(self) -> Message:
        """Return the next part of the body, counted; while it lasts it must not take too long."""
        if self.whole:
            return await self._receive()
        left = self.guard.limits.body_seconds - (time.perf_counter() - self.start)
        with anyio.move_on_after(max(left, 0.01)) as waited:
            message = await self._receive()
        if waited.cancelled_caught:
            raise Refusal(408, f"body: not all there after {self.guard.limits.body_seconds:g} s", "body")
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self.received > self.guard.limits.body_mib * MIB:
                await self._refuse_body()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers["X-Request-Id"] = self.id
            if self.allowed:
                headers["Access-Control-Allow-Origin"], headers["Vary"] = self.allowed, "Origin"
                headers["Cross-Origin-Resource-Policy"] = "cross-origin"
                for name, value in ALLOWED.items():
                    headers[f"Access-Control-{name}"] = value
            if not self.whole and self.status in (408, 413):
                headers["Connection"] = "close"  # what comes of the body is nobody's request
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self._send(message)

    def _note(self) -> None:
        """Count the exchange, and log it in one line."""
        route = getattr(self.scope.get("route"), "path", "other")
        seconds, status = time.perf_counter() - self.start, self.status or 499
        metrics = self.guard.metrics
        metrics.requests.labels(route, status).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        if status >= 400:
            metrics.rejected.labels(status).inc()
        said = dict(self.scope["state"]["said"])
        if not self.guard.log_prompts:
            said.pop("prompt", None)
        line = {
            "time": round(time.time(), 3),
            "request": self.id,
            "method": self.scope["method"],
            "route": route,
        }
        line |= {
            "status": status,
            "seconds": round(seconds, 4),
            "in": self.received,
            "out": self.sent,
            **said,
        }
        log.info("%s", json.dumps(line, ensure_ascii=False))


def _fault(error: Exception) -> str:
    """Return what is wrong with the server: of its disk the reason, of another fault the kind."""
    of_disk = isinstance(error, sqlite3.Error) or (isinstance(error, OSError) and error.strerror)
    return f"its disk: {reason_of(error)}" if of_disk else type(error).__name__


def refused(error: Refusal) -> JSONResponse:
    """Return a refusal as an answer."""
    headers = dict(error.headers)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)
