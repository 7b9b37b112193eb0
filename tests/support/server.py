"""A server of the tiny model on a free port, in this process; and what asks it."""

import http.client
import io
import json
import socket
import threading
import time
from contextlib import contextmanager
from functools import cache

import uvicorn
from PIL import Image

from runtime import LocalControlPipeline
from runtime.serve.limits import Limits
from runtime.serve.options import make_parser
from runtime.serve.service import Service
from runtime.serve.web.app import make_app
from runtime.serve.web.guard import Access
from runtime.serve.web.wire import config_of, listening
from tests.support.tiny import make_adapter, make_pipeline

SMALL = {"prompt": "a red star", "height": 64, "width": 64, "steps": 3, "seed": 7}


@cache
def pipe() -> LocalControlPipeline:
    return LocalControlPipeline.from_diffusers(make_pipeline(), {"canny": make_adapter()})


class Client:
    """Asks one server; every answer is a status, headers in lower case, and bytes."""

    def __init__(self, port: int, service: Service, headers=None):
        self.port, self.service, self.headers = port, service, headers or {}

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        headers = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def post(self, path, body=None, **headers):
        return self.ask("POST", path, body, **headers)

    def error(self, status, path, body=None, method="POST", **headers):
        """The error's message, of an answer of this status."""
        found, _, data = self.ask(method, path, body, **headers)
        assert found == status, (found, data[:500])
        error = json.loads(data)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
        return error

    def picture(self, body, path="/v1/generate"):
        status, _, data = self.post(path, body)
        assert status == 200, data
        return Image.open(io.BytesIO(data))

    def job(self, id, until=("done", "failed", "cancelled", "interrupted")):
        """A job, once it is in one of these states."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            status, _, data = self.get(f"/v1/jobs/{id}")
            assert status == 200, data
            job = json.loads(data)
            if job["state"] in until:
                return job
            time.sleep(0.01)
        raise AssertionError(job)

    def open(self, path, body=None, method="POST", **headers):
        """A socket on which a request was sent, its answer to be read or not."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines += ["Content-Type: application/json"] if data else []
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=90)
        opened.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        return opened


def events(data: bytes) -> list[tuple[str, dict]]:
    """The kind and what it says of each server-sent event."""
    found = []
    for block in data.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@contextmanager
def running(folder, *, on=None, access: Access | None = None, headers=None, log_prompts=False, **limits):
    """A client of a server that is ready."""
    options = make_parser().parse_args([])
    service = Service.of(on or pipe(), folder, options, Limits(**limits), "0" * 32)
    config = config_of(make_app(service, access, log_prompts), service.limits)
    config.timeout_graceful_shutdown = 2
    server = uvicorn.Server(config)
    listener = listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    client = Client(listener.getsockname()[1], service, headers)
    while client.get("/readyz")[0] != 200:
        time.sleep(0.01)
    try:
        yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
