"""Requests as orders, each with the id of its picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from runtime.batch.requests import Line
from runtime.capabilities import Capabilities
from runtime.errors import first_line
from runtime.serve.files import DATA_URL, Files, from_base64
from runtime.serve.limits import Limits
from runtime.serve.orders import Order, Orders, of_validation
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Generate

UNSEEN = {"images", "session", "previews"}  # what does not change a picture
MANY = 10**9
# Nobody else waits: only what one request may be is bounded
LIMITS = Limits(
    queue=MANY, queue_per_key=MANY, queue_mib=MANY, queued_seconds=MANY, running_seconds=MANY, regions=64, images=1024,
    steps=1000, side=16384, megapixels=256, patience=60,
)  # fmt: skip


class Beside(Files):
    """Pictures by their paths, from the folder of the file that names them; or in data URLs."""

    def __init__(self, limits: Limits):
        self.limits, self.base = limits, Path()

    def read(self, text: str, field: str) -> tuple[str, bytes]:
        """Return the hash and the bytes of a picture. Raises Refusal, naming `field`."""
        try:
            data = (
                from_base64(text, field)
                if DATA_URL.match(text)
                else (self.base / text).expanduser().read_bytes()
            )
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a home of nobody
            if isinstance(error, Refusal):
                raise
            raise Refusal(
                404, f"{field} {text[:200]}: {first_line(error)}; expected a picture", field
            ) from error
        return hashlib.sha256(data).hexdigest(), data


class Ordered:
    """Makes orders for one pipeline."""

    def __init__(
        self, capabilities: Capabilities, model: str, rows: float = float("inf"), deterministic: bool = False
    ):
        """model: its hash. rows: of one request, at most. deterministic: every picture is drawn by itself."""
        self.files, self.model, self.deterministic = Beside(LIMITS), model, deterministic
        self.orders = Orders(capabilities, self.files, LIMITS, rows)

    def of(self, line: Line) -> Iterator[tuple[str, Generate]]:
        """Yield each picture's id, and its request. No picture is decoded for that. Raises Refusal."""
        if line.body is None:
            raise Refusal(422, line.error or "not a request")
        try:
            # as JSON, which has lists where Python has tuples
            body = Generate.model_validate_json(json.dumps(line.body))
        except ValidationError as error:
            raise of_validation(error) from None
        if not 1 <= body.images <= LIMITS.images:
            raise Refusal(422, f"images {body.images}: expected 1 to {LIMITS.images}", "images")
        if self.deterministic:
            body = body.model_copy(update={"deterministic": True})
        canonical = self._canonical(body, line.base)
        # a request without a seed has the same one every time
        seed = body.seed if body.seed is not None else int(_hash(canonical)[:8], 16)
        for i in range(body.images):
            single = body.model_copy(update={"images": 1, "seed": seed + i})
            yield _hash({**canonical, "seed": seed + i}), single

    def order(self, body: Generate, base: Path) -> Order:
        """Return a picture's order. base: where its pictures' paths start. Raises Refusal."""
        self.files.base = base
        return self.orders.order(body)

    def _canonical(self, body: Generate, base: Path) -> dict:
        """Return all that makes a picture: settings, pictures by their hashes, the model. Raises Refusal."""
        self.files.base = base
        said = body.model_dump(mode="json", exclude_none=True, exclude=UNSEEN)
        if body.image is not None:
            said["image"] = self.files.read(body.image, "image")[0]
        for i, region in enumerate(said["regions"]):
            for name in region.keys() & {"condition", "mask"}:
                region[name] = self.files.read(region[name], f"regions.{i}.{name}")[0]
        return {"model": self.model, **said}


def _hash(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
