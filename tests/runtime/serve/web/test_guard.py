"""runtime.serve.web.guard: who may ask, how much may be sent, what is logged."""

import json
import logging
import socket

import pytest
from starlette.datastructures import Headers

from runtime.serve.refusals import Refusal
from runtime.serve.web import guard
from runtime.serve.web.guard import HEADERS, Access
from tests.support.server import SMALL, running, wait_until


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve"), body_mib=1, body_seconds=2.0) as client:
        yield client


def check(access, path="/v1/generate", **headers):
    return access.check(path, Headers({name.replace("_", "-"): value for name, value in headers.items()}))


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"])
def test_names_of_this_machine(host):
    assert check(Access(), host=host) == ""


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example:1", "[::1", "a b"]
)
def test_another_name_is_refused(host):
    with pytest.raises(Refusal) as caught:
        check(Access(), host=host)
    assert (caught.value.status, caught.value.field) == (400, "Host")


def test_other_names_and_sites_by_option():
    access = Access(hosts=("pictures.example",), origins=("https://shop.example",))
    assert check(access, host="pictures.example:443", origin="https://shop.example") == ""
    with pytest.raises(Refusal):
        check(access, host="localhost")
    assert check(Access(keys=("k",), hosts=()), host="any", authorization="Bearer k")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://", "http://["]
)
def test_pages_of_other_sites_are_refused(origin):
    with pytest.raises(Refusal) as caught:
        check(Access(), host="127.0.0.1:8000", origin=origin)
    assert (caught.value.status, caught.value.field) == (403, "Origin")
    assert check(Access(), host="127.0.0.1:8000", origin="http://127.0.0.1:8000") == ""


def test_keys_are_owners():
    access = Access(keys=("one", "zwölf", "là"), hosts=())
    first, second, third = (check(access, authorization=f"Bearer {key}") for key in access.keys)
    for key, owner in (("zwölf", second), ("là", third)):  # sent as UTF-8, which a server reads as Latin-1
        assert check(access, authorization=f"Bearer {key.encode().decode('latin-1')}") == owner
    assert first != second and "one" not in first
    for given in ("", "one", "Bearer", "Bearer  ", "Basic one", "Bearer one two", "Bearer ONE"):
        with pytest.raises(Refusal) as caught:
            check(access, authorization=given)
        assert caught.value.status == 401
    assert check(access, "/healthz") == ""


def test_a_body_is_counted_before_it_comes_and_while_it_does(client, monkeypatch):
    monkeypatch.setattr(guard, "SWALLOW", 60.0)  # a busy machine takes longer than a client is waited for
    error = client.error(413, "/v1/generate", b"x" * (2**20 + 1), Content_Type="application/json")
    assert error == {**error, "param": "body", "message": "body: more than 1 MiB; expected less"}

    def parts():
        for _ in range(40):
            yield b"x" * 50_000

    assert client.error(413, "/v1/files", parts())["param"] == "body"


def test_a_body_that_does_not_come_is_not_waited_for(client):
    opened = socket.create_connection(("127.0.0.1", client.port), timeout=10)
    head = (
        "POST /v1/generate HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Content-Length: 50",
    )
    opened.sendall("\r\n".join([*head, "", "{"]).encode())
    assert opened.recv(2000).startswith(b"HTTP/1.1 408 ")
    opened.close()


def test_a_client_that_goes_within_its_body_is_no_error_of_ours(client, caplog):
    with caplog.at_level(logging.INFO, "runtime.serve"):
        head = ("POST /v1/files HTTP/1.1", "Host: localhost", "Content-Length: 50")
        opened = socket.create_connection(("127.0.0.1", client.port), timeout=10)
        opened.sendall("\r\n".join([*head, "", "x"]).encode())
        opened.close()
        wait_until(lambda: '"status": 499' in caplog.text)
    assert "ClientDisconnect" not in caplog.text and '"status": 500' not in caplog.text


HEADS = [b"GET / HTTP/1.1", b"GET /docs HTTP/1.1\r\nHost: evil", b"nonsense", b"\x16\x03\x01\x02\x00"]


@pytest.mark.parametrize("head", HEADS)
def test_foreign_heads_are_answered_or_dropped(client, head):
    opened = socket.create_connection(("127.0.0.1", client.port), timeout=10)
    opened.sendall(head + b"\r\n\r\n")
    opened.shutdown(socket.SHUT_WR)
    answer = opened.recv(2000)
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    opened.close()
    assert client.get("/healthz")[0] == 200


def test_half_a_head_does_not_hold_a_connection(tmp_path):
    """At once, and after a first request that was whole; one that is being answered is let go on."""
    with running(tmp_path, head_seconds=1.0) as client:
        for first in (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            opened = socket.create_connection(("127.0.0.1", client.port), timeout=10)
            opened.sendall(first)
            if first:
                answer = b""
                while not answer.endswith(b"ok\n"):
                    answer += opened.recv(2000)
            opened.sendall(b"GET /healthz HT")
            assert opened.recv(2000) == b""
            opened.close()
        assert client.post("/v1/generate", {**SMALL, "steps": 60})[0] == 200


def test_too_many_at_a_time_are_asked_to_come_again(tmp_path):
    with running(tmp_path, connections=2) as client:
        opened = [client.open("/v1/generate", {**SMALL, "steps": 100}) for _ in range(2)]
        wait_until(lambda: client.service.engine.busy)
        status, headers, data = client.get("/v1/capabilities")
        assert (
            client.get("/healthz")[0] == 200
            and (status, headers["retry-after"]) == (503, "2")
            and json.loads(data)["error"]["type"] == "overloaded_error"
        )
        for each in opened:
            each.close()
        wait_until(lambda: client.get("/v1/capabilities")[0] == 200)


def test_pages_of_a_site_that_was_allowed_may_read_the_answers(tmp_path):
    site = "https://shop.example"
    with running(tmp_path, access=Access(keys=("k",), origins=(site,))) as client:
        status, headers, _ = client.ask("OPTIONS", "/v1/generate", Origin=site)
        assert status == 204 and headers["access-control-allow-origin"] == site
        assert "Authorization" in headers["access-control-allow-headers"]
        headers = client.post("/v1/generate", SMALL, Origin=site, Authorization="Bearer k")[1]
        assert headers["access-control-allow-origin"] == site and headers["vary"] == "Origin"
        warned = {**SMALL, "prompt": "a star <lora:x:1>"}
        headers = client.post("/v1/generate", warned, Origin=site, Authorization="Bearer k")[1]
        own = {name for name in headers if name.startswith("x-")} - {"x-content-type-options"}
        assert "x-warnings" in own <= set(headers["access-control-expose-headers"].lower().split(", "))
        assert client.ask("OPTIONS", "/v1/generate", Origin="https://evil.example")[0] == 403
        assert "access-control-allow-origin" not in client.get("/healthz")[1]


def test_every_answer_has_the_headers(client):
    for path in ("/healthz", "/nothing", "/docs"):
        headers = client.get(path)[1]
        assert headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in headers
        assert all(headers[name.lower()] == value for name, value in HEADERS.items())


def test_a_line_a_request_without_prompts_unless_asked(client, caplog, tmp_path):
    def line(route, number=0):
        """The line of a request, which comes after its answer."""
        found = []

        def there():
            records = [json.loads(r.message) for r in caplog.records if r.name == "runtime.serve.requests"]
            found[:] = [each for each in records if each["route"] == route]
            return len(found) > number

        wait_until(there)
        return found[number]

    with caplog.at_level(logging.INFO, "runtime.serve.requests"):
        client.post("/v1/generate", {**SMALL, "prompt": "a secret"})
        client.get("/v1/jobs/x")
        drawn = line("/v1/generate")
        assert (drawn["status"], drawn["steps"]) == (200, 3) and drawn["denoise"] > 0
        assert "secret" not in caplog.text and line("/v1/jobs/{id}")["status"] == 404
        with running(tmp_path, log_prompts=True) as other:
            other.post("/v1/generate", {**SMALL, "prompt": "a secret"})
            assert line("/v1/generate", 1)["prompt"] == "a secret"


def test_one_key_does_not_take_every_connection(tmp_path):
    with running(tmp_path, access=Access(keys=("one", "two")), connections=4) as client:
        job = {**SMALL, "steps": 100}
        opened = [client.open("/v1/generate", job, Authorization="Bearer one") for _ in range(2)]
        wait_until(lambda: client.service.unfinished == 2)
        assert client.get("/v1/capabilities", Authorization="Bearer one")[0] == 503
        assert client.get("/v1/capabilities", Authorization="Bearer two")[0] == 200
        for each in opened:
            each.close()
