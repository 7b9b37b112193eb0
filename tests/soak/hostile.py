"""Bodies that were right once, and damaged since."""

from __future__ import annotations

import collections
import random
import time
from pathlib import Path

import numpy as np

from tests.fuzz.mutate import damaged, json_bytes
from tests.soak.clients import LEFT
from tests.soak.process import Server
from tests.support.server import png

SLOW = 5.0  # seconds of an answer
WHOLE = {
    "prompt": "a", "negative_prompt": "b", "steps": 1, "guidance": 5.0, "guidance_range": [0, 1], "seed": 3,
    "height": 64, "width": 64, "scheduler": "euler", "preset": "lcm4", "outside": "free", "deterministic": True,
    "session": "s", "images": 1, "previews": True, "metadata": "full", "cache_interval": 1, "clip_skip": 0,
}  # fmt: skip
MULTIPART = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'


def a_body(rng: random.Random, bodies: list[dict]) -> tuple[str, bytes, str]:
    """Return a route, a body, and its type."""
    kind = rng.randrange(8)
    if kind == 0:
        return "/v1/files", damaged(png(LEFT), rng), "image/png"
    if kind == 1:
        clear, name = png(LEFT.convert("RGBA")), b'; filename="a"'
        mask = rng.choice([damaged(clear, rng), clear[: rng.randrange(len(clear))]])
        parts = [
            (b"prompt", b"", b"a"),
            (b"steps", b"", b"1"),
            (b"image", name, png(LEFT)),
            (b"mask", name, mask),
        ]
        data = b"".join(MULTIPART % part for part in parts) + b"--b--\r\n"
        return "/v1/images/edits", rng.choice([data, damaged(data, rng)]), "multipart/form-data; boundary=b"
    if kind == 2:
        body = {
            "image": bodies[1]["regions"][0]["mask"],
            "preprocess": rng.choice(["canny", "sketch", "color"]),
        }
        return "/v1/conditions", json_bytes(body, rng), "application/json"
    if kind == 3:
        body = {"prompt": "a", "n": 1, "size": "64x64", "steps": 1, "stream": True, "partial_images": 1}
        return "/v1/images/generations", json_bytes(body, rng), "application/json"
    body = {**WHOLE, **rng.choice(bodies), "steps": 1} if kind < 6 else {**rng.choice(bodies), "steps": 1}
    return rng.choice(["/v1/generate", "/v1/jobs"]), json_bytes(body, rng), "application/json"


def hostile(folder: Path, count: int, bodies: list[dict], truths: list[np.ndarray]) -> list[str]:
    """Return the faults of a server that is sent so many."""
    server, faults, codes, slowest = Server(folder), [], collections.Counter(), 0.0
    for number in range(count):
        route, data, kind = a_body(random.Random(f"hostile {number}"), bodies)
        start = time.perf_counter()
        try:
            status, _, answer = server.client.post(route, data, Content_Type=kind)
        except OSError as error:
            faults.append(f"{number} {route}: {type(error).__name__}: {error}")
            continue
        seconds = time.perf_counter() - start
        codes[status], slowest = codes[status] + 1, max(slowest, seconds)
        if status >= 500 or seconds > SLOW or b'"500"' in answer:
            faults.append(f"{number} {route}: {status} in {seconds:.1f} s: {answer[:300]}")
    print(f"{count} bodies: {dict(sorted(codes.items()))}, the slowest {slowest:.2f} s, {server.state()}")
    server.kill()
    return faults
