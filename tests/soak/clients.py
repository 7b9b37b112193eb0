"""Clients that behave in every way, and the requests they send."""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import io
import json
import random
import threading
import time

import numpy as np
from PIL import Image

from runtime import LocalControlPipeline, Region
from tests.support.server import Client, png

CLIENTS = 64
STEPS = (2, 3, 4, 6, 8)
ROUNDING = 1  # grey levels of a picture by itself and one that has shared its steps
LEFT = Image.new("L", (128, 128))
LEFT.paste(255, (0, 0, 64, 128))
LINES = Image.effect_noise((128, 128), 90).point(lambda x: 255 * (x > 180))


def kinds() -> list[dict]:
    """Requests of many kinds, each drawn the same way every time."""
    rng, found = random.Random(0), []
    region = {
        name: base64.b64encode(png(image)).decode() for name, image in (("condition", LINES), ("mask", LEFT))
    }
    for seed in range(12):
        body = {"prompt": rng.choice(["a red star", "a blue square on sand", "a yellow heart"]), "seed": seed}
        body |= {"steps": rng.choice(STEPS), "guidance": rng.choice([1.0, 5.0])}
        body |= {"regions": [region]} if seed % 2 else {}
        body |= {"regions": [{"prompt": "a green circle", "mask": region["mask"]}]} if seed % 5 == 0 else {}
        body |= {"scheduler": "euler_a"} if seed % 4 == 3 else {}
        found.append(body)
    return found


def solo(pipe: LocalControlPipeline, body: dict) -> np.ndarray:
    """Return a request's picture by itself."""
    options = dict(body)
    opened = {"condition": LINES, "mask": LEFT}
    regions = [
        Region(**{k: opened.get(k, v) if k in opened else v for k, v in r.items()})
        for r in options.pop("regions", [])
    ]
    return np.asarray(pipe(options.pop("prompt"), regions, **options).images[0])


class Rough:
    """Clients that behave in every way, and what became of it."""

    def __init__(self, client: Client, bodies: list[dict], truths: list[np.ndarray], seed: int = 0):
        self.client, self.bodies, self.truths = client, bodies, truths
        self.counts: collections.Counter = collections.Counter()
        self.faults: list[str] = []
        self.jobs: dict[str, int] = {}  # acknowledged -> which kind
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self.threads = [
            threading.Thread(target=self._run, args=(seed + i,), daemon=True) for i in range(CLIENTS)
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def join(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        ways = [self.draw, self.draw, self.stream, self.job, self.job, self.leave, self.half, self.slow]
        while not self.stop.is_set():
            way, kind = rng.choice(ways), rng.randrange(len(self.bodies))
            try:
                way(kind, rng)
                self._count(way.__name__)
            except (OSError, http.client.HTTPException) as error:
                self._count(f"{way.__name__}: {type(error).__name__}")
                time.sleep(0.05)
            except Exception as error:
                self.faults.append(f"{way.__name__} {kind}: {type(error).__name__}: {error}")

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def check(self, data: bytes, kind: int) -> None:
        """Note a picture that is not its solo one."""
        found = np.asarray(Image.open(io.BytesIO(data)))
        off = int(np.abs(found.astype(int) - self.truths[kind]).max())
        if off > ROUNDING:
            self.faults.append(f"picture {kind}: {off} grey levels off")

    def _refused(self, status: int, headers: dict, data: bytes) -> bool:
        """Return whether the server has asked to come again later."""
        if status in (429, 503, 504):
            self._count(str(status))
            time.sleep(min(0.2, float(headers.get("retry-after", 0.2))))
            return True
        if status >= 400:
            self.faults.append(f"{status}: {data[:200]}")
        return status >= 400

    def draw(self, kind: int, rng: random.Random) -> None:
        status, headers, data = self.client.post("/v1/generate", self.bodies[kind])
        if not self._refused(status, headers, data):
            self.check(data, kind)

    def stream(self, kind: int, rng: random.Random) -> None:
        body = {**self.bodies[kind], "stream": True, "previews": rng.random() < 0.5}
        status, headers, data = self.client.post("/v1/generate", body)
        if not self._refused(status, headers, data) and b"event: done" in data:
            said = json.loads(data.rpartition(b"event: done\ndata: ")[2].partition(b"\n\n")[0])
            self.check(base64.b64decode(said["pictures"][0]), kind)

    def job(self, kind: int, rng: random.Random) -> None:
        key = f"{rng.random()}" if rng.random() < 0.5 else None
        headers = {"Idempotency_Key": key} if key else {}
        while True:
            status, answered, data = self.client.post("/v1/jobs", self.bodies[kind], **headers)
            if not self._refused(status, answered, data):
                break
            if status not in (429, 503) or self.stop.is_set():
                return
        id = json.loads(data)["id"]
        with self._lock:
            self.jobs[id] = kind
        if key:
            again = json.loads(self.client.post("/v1/jobs", self.bodies[kind], **headers)[2])
            if again.get("id", id) != id:
                self.faults.append(f"two jobs of one key: {id}, {again}")
        if rng.random() < 0.5:
            with contextlib.closing(self.client.open(f"/v1/jobs/{id}/events", method="GET")) as opened:
                opened.recv(200)

    def leave(self, kind: int, rng: random.Random) -> None:
        """Send a request and go at some time before its end."""
        body = {**self.bodies[kind], "steps": 30, "stream": rng.random() < 0.5}
        with contextlib.closing(self.client.open("/v1/generate", body)):
            time.sleep(rng.random() * 0.3)

    def half(self, kind: int, rng: random.Random) -> None:
        """Send a part of a request and go."""
        with contextlib.closing(self.client.open("/healthz", method="GET")) as opened:
            opened.sendall(
                b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n{"[
                    : rng.randrange(99)
                ]
            )
            time.sleep(rng.random() * 0.2)

    def slow(self, kind: int, rng: random.Random) -> None:
        """Send a request's bytes one by one for a while, then whole."""
        data = json.dumps(self.bodies[kind]).encode()
        head = f"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        with contextlib.closing(self.client.open("/healthz", method="GET")) as opened:
            opened.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n")
            for i in range(20):
                opened.sendall(data[i : i + 1])
                time.sleep(rng.random() * 0.02)
            opened.sendall(data[20:])
            found = b""
            while part := opened.recv(65536):
                found += part
        if b"image/png" in found:
            self.check(found[found.index(b"\x89PNG") :], kind)
