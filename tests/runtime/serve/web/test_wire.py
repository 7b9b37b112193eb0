"""runtime.serve.web.wire: what there is to listen on, and what is said where there is nothing."""

import socket

import pytest

from runtime.serve.web.wire import listening
from tests.support.refusals import refusal


def test_a_port_that_is_free_is_listened_on():
    with listening("127.0.0.1", 0) as listener:
        socket.create_connection(listener.getsockname()).close()


@pytest.mark.parametrize("host", ["..", "::1%nope", "203.0.113.9"])
def test_a_host_that_is_not_this_machine_is_named(host):
    """Another port would not help."""
    said = refusal(listening, host, 8000)
    assert said.startswith(f"--host {host} --port 8000: ") and said.endswith(
        "; expected an address of this machine"
    )
    assert "Unknown" not in said


def test_a_port_that_another_has_is_named():
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert refusal(listening, "127.0.0.1", port).endswith("; try another port")
