"""runtime.serve.refusals: the field that a message is about, and the shape of an error."""

import pytest

from runtime.errors import InputError
from runtime.serve.refusals import Refusal, field_of


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("steps 0: expected a whole number", "steps"),
        ("regions.0: scale 'x': expected a number", "regions.0.scale"),
        ("regions.12: condition is missing", "regions.12.condition"),
        ("regions.3 mask: all zero", "regions.3.mask"),
        ("regions.0.mask 'x': expected a file's id", "regions.0.mask"),
        ("Host 'x': expected", None),
        ("", None),
    ],
)
def test_the_field_is_what_a_message_begins_with(message, field):
    assert field_of(message) == field


def test_one_line_in_openais_shape():
    refusal = Refusal.of(InputError("steps 0: expected\na whole number"))
    assert refusal.body() == {
        "error": {
            "message": "steps 0: expected a whole number", "type": "invalid_request_error", "param": "steps",
            "code": "422",
        }
    }  # fmt: skip
    assert refusal.headers == {}
    assert Refusal(429, "x", retry_after=0.2).headers == {"Retry-After": "1"}
    assert Refusal(500, "x").body()["error"]["type"] == "server_error"
