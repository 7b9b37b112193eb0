"""python -m tests.soak: a server under rough clients, and one that is killed again and again.

`--minutes 10`: 64 clients that send, go away, are slow, send halves and follow events; at the end no job may be lost,
no picture be another than its solo one, and memory, files and threads be what they were. `--kills 20`: the server is
killed under load; after each start every acknowledged job is done, failed or interrupted, and no picture is torn.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

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


class Server:
    """A process that serves the embedded model from one folder."""

    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "runtime.serve", "--data", str(folder), "--port", "0", *options]
        self.log = open(folder / "log.txt", "a+")  # noqa: SIM115 -- as long as the process
        start = self.log.seek(0, os.SEEK_END)
        self.process = subprocess.Popen(command, stderr=self.log)
        while not (port := self._port(start)):
            assert self.process.poll() is None, (folder / "log.txt").read_text()[-2000:]
            time.sleep(0.1)
        self.client = Client(port, None)
        while self.client.get("/readyz")[0] != 200:
            time.sleep(0.1)

    def _port(self, start: int) -> int | None:
        with open(self.log.name) as file:
            file.seek(start)
            lines = [line for line in file if line.startswith("serving ")]
        return int(lines[-1].rpartition(":")[2]) if lines else None

    def state(self) -> dict[str, int]:
        """Return MiB of memory, open files and threads."""
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return {
            "MiB": pages * os.sysconf("SC_PAGE_SIZE") // 2**20,
            "files": len(list((proc / "fd").iterdir())),
            "threads": len(list((proc / "task").iterdir())),
        }

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()


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
            except (ConnectionError, OSError, TimeoutError) as error:
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


def settled(client: Client, jobs: dict[str, int]) -> dict[str, dict]:
    """Return every job once none is open; one that was removed to make room is not there."""
    found = {}
    for id in jobs:
        while True:
            status, _, data = client.get(f"/v1/jobs/{id}")
            if status == 404 or json.loads(data)["state"] not in ("queued", "running"):
                break
            time.sleep(0.05)
        found[id] = json.loads(data) if status == 200 else {"state": "missing"}
    return found


def soak(folder: Path, minutes: float, bodies: list[dict], truths: list[np.ndarray]) -> list[str]:
    """Return the faults of a server under rough clients for some minutes."""
    server = Server(folder, "--jobs", "1000000", "--queue", "48")
    rough, end, states = Rough(server.client, bodies, truths), time.monotonic() + 60 * minutes, []
    rough.start()
    while time.monotonic() < end:
        time.sleep(min(10.0, max(0.1, end - time.monotonic())))
        states.append(server.state())
        print({**states[-1], "drawn": sum(rough.counts.values()), "faults": len(rough.faults)}, flush=True)
    rough.join()
    jobs = settled(server.client, rough.jobs)
    lost = [id for id, job in jobs.items() if job["state"] not in ("done", "failed")]
    for id, job in list(jobs.items())[-200:]:
        if job["state"] == "done":
            rough.check(server.client.get(job["images"][0])[2], rough.jobs[id])
    time.sleep(6)  # connections that were kept open end
    states.append(server.state())
    half = states[len(states) // 2 :]
    slope = np.polyfit(range(len(half)), [state["MiB"] for state in half], 1)[0] if len(half) > 2 else 0.0
    print(f"{len(jobs)} jobs, {len(lost)} lost; {dict(rough.counts)}")
    print(f"memory at the end {states[-1]['MiB']} MiB, slope of the second half {slope * 6:.2f} MiB a minute")
    print(
        f"files {states[0]['files']} -> {states[-1]['files']}, threads {states[0]['threads']} -> {states[-1]['threads']}"
    )
    server.kill()
    return rough.faults + [f"lost {id}: {jobs[id]}" for id in lost]


def kills(folder: Path, count: int, bodies: list[dict], truths: list[np.ndarray]) -> list[str]:
    """Return the faults of a server that is killed under load."""
    faults, acknowledged = [], {}
    for turn in range(count):
        server = Server(folder, "--jobs", "1000000")
        rough = Rough(server.client, bodies, truths, seed=1000 * turn)
        states = settled(server.client, acknowledged)
        for id, job in states.items():
            if job["state"] not in ("done", "failed", "interrupted"):
                faults.append(f"{id}: {job}")
            elif job["state"] == "done":
                rough.check(server.client.get(job["images"][0])[2], acknowledged[id])
        rough.start()
        time.sleep(1.5 + random.random() * 2)
        rough.stop.set()
        server.kill()
        rough.join()
        acknowledged |= rough.jobs
        faults += [fault for fault in rough.faults if "KeyError" not in fault]
        found = collections.Counter(job["state"] for job in states.values())
        print(
            f"kill {turn + 1}: {len(acknowledged)} jobs, before it {dict(found)}, {len(faults)} faults",
            flush=True,
        )
    return faults


def main(arguments: list[str] | None = None) -> int:
    """Return 0 where there was no fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args(arguments)
    pipe, bodies = LocalControlPipeline.from_pretrained(), kinds()
    truths = [solo(pipe, body) for body in bodies]
    del pipe
    faults = []
    for run, amount in ((soak, options.minutes), (kills, options.kills)):
        if amount:
            with tempfile.TemporaryDirectory(prefix="localcontrol-soak-") as folder:
                faults += run(Path(folder), amount, bodies, truths)
    for fault in faults[:40]:
        print(f"fault: {fault}")
    print(f"{len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
