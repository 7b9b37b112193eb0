"""The server's connections: the socket it listens on, those that are held open for nothing, and its end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import time

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.cli.command import say
from runtime.errors import InputError
from runtime.serve.limits import Limits
from runtime.serve.service import Service

HEAD_BYTES = 2**16  # of a request's head


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises InputError where the address is another's, or none."""
    if not 0 <= port < 65536:
        raise InputError(f"--port {port}: expected 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol's name: asyncio then sends small packets at once (TCP_NODELAY), and not after 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # on Windows it would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        return listener
    except OSError as error:
        listener.close()
        raise InputError(f"--host {host} --port {port}: {_refused(error)}") from error


def _refused(error: OSError) -> str:
    """Return why there is nothing to listen on, and what to do about it."""
    if isinstance(error, socket.gaierror):  # its number is none of the system's
        return f"{error.strerror}; expected an address of this machine"
    reason = os.strerror(error.errno) if error.errno else error
    elsewhere = error.errno == errno.EADDRNOTAVAIL
    return f"{reason}; {'expected an address of this machine' if elsewhere else 'try another port'}"


class Patient(H11Protocol):
    """uvicorn's HTTP, which waits for a request's head only so long: half a head would hold a connection for good."""

    seconds = 15.0  # in which a head has to come

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait(self.cycle)

    def _wait(self, before: object) -> None:
        """Close the connection where, after a while, it has no request but the one there was before."""
        self._timer = self.loop.call_later(self.seconds, self._look, before)

    def _look(self, before: object) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is before:
            self.transport.close()
        else:
            self._wait(self.cycle if idle else None)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(error)


def config_of(app: FastAPI, limits: Limits) -> uvicorn.Config:
    """Return uvicorn's configuration; its own limit stands above ours, whose answer is JSON."""
    return uvicorn.Config(
        app,
        http=type("Patient", (Patient,), {"seconds": limits.head_seconds}),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=2 * limits.connections,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )


class Server(uvicorn.Server):
    """uvicorn's server: at a signal it takes no more work, and stops once what runs has ended.

    At a second one it stops at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, number: int, frame) -> None:
        """Begin to end; called by a signal."""
        if self.service.engine.draining:
            self.should_exit = self.force_exit = True
            return
        say("ending: what runs is finished, nothing new is taken")
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        engine, seconds = self.service.engine, self.service.limits.drain_seconds
        engine.drain()
        until = time.monotonic() + seconds
        while self.service.unfinished and time.monotonic() < until:
            time.sleep(0.02)
        engine.stop(1.0)
        self.should_exit = True
