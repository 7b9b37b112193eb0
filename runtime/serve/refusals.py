"""Errors of the server: one shape, OpenAI's, one line that names the field."""

from __future__ import annotations

import re

from runtime.errors import InputError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Refusal(Exception):
    """What a client is told instead of a picture: the status, one line, and the field it is about."""

    def __init__(self, status: int, message: str, field: str | None = None, retry_after: float | None = None):
        super().__init__(" ".join(message.split()))
        self.status, self.field, self.retry_after = status, field, retry_after

    def __reduce__(self):
        """Let it come from another process as it is."""
        return Refusal, (self.status, str(self), self.field, self.retry_after)

    @classmethod
    def of(cls, error: InputError, status: int = 422) -> Refusal:
        """Return bad input as a refusal; the field is what its message begins with."""
        return cls(status, str(error), field_of(str(error)))

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}

    def body(self) -> dict:
        """Return the JSON body, as OpenAI's API has it."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": str(self.status)}}


def field_of(message: str) -> str | None:
    """Return the field that an InputError's message begins with: "steps", or "regions.0.scale" of a region's."""
    found = re.match(r"(regions\.\d+)(?:(?:: | |\.)(\w+))?|([a-z_0-9]+)", message)
    if found is None:
        return None
    region, own, field = found.groups()
    return field or (f"{region}.{own}" if own else region)
