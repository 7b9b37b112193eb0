"""python -m tests.soak: a server under rough clients, one that is killed, and one that is sent nonsense.

`--minutes 10`: 64 clients that send, go away, are slow, send halves and follow events; at the end no job may be lost,
no picture be another than its solo one, and memory, files and threads be what they were. `--kills 20`: the server is
killed under load; after each start every acknowledged job is done, failed or interrupted, and no picture is torn.
`--bodies 10000`: bodies that were right once, and damaged since: no answer may be the server's fault, or take 5 s.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from runtime import LocalControlPipeline
from tests.soak.clients import Rough, kinds, solo
from tests.soak.hostile import hostile
from tests.soak.process import Server
from tests.support.server import Client


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
    before, after = states[0], states[-1]
    print(f"files {before['files']} -> {after['files']}, threads {before['threads']} -> {after['threads']}")
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
        time.sleep(3 + random.random() * 3)
        rough.stop.set()
        server.kill()
        rough.join()
        acknowledged |= rough.jobs
        faults += rough.faults
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
    parser.add_argument("--bodies", type=int, default=0)
    options = parser.parse_args(arguments)
    pipe, bodies = LocalControlPipeline.from_pretrained(), kinds()
    truths = [solo(pipe, body) for body in bodies]
    del pipe
    faults = []
    for run, amount in ((soak, options.minutes), (kills, options.kills), (hostile, options.bodies)):
        if amount:
            with tempfile.TemporaryDirectory(prefix="localcontrol-soak-") as folder:
                faults += run(Path(folder), amount, bodies, truths)
    for fault in faults[:40]:
        print(f"fault: {fault}")
    print(f"{len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
