"""python -m benchmarks.cluster [--requests 100] [--out folder]

What Ray costs: the embedded model behind the plain server and behind `--ray`, one request after the other, the same
ones in turns; the CPU that each process takes for one; how long a start takes; how much memory each process has; how
fast the object store takes and gives. Everything on this machine. Writes <out>/cluster.csv. Needs the extra ray.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from benchmarks.measure import check_counts, check_out, environment, results_folder, write_rows
from runtime.cli.command import Parser, exit_code, say

MIB = 2**20
SHORT = {"prompt": "a red star on sand", "steps": 1, "seed": 7, "height": 64, "width": 64, "guidance": 1.0}
# A process of the cluster by what its command line begins with, or has in it
PROCESSES = {
    "engine": "ray::ServeReplica:localcontrol:engine",
    "ingress": "ray::ServeReplica:localcontrol:ingress",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}
MORE = 20  # steps
BLOCK = 2**24  # bytes, of an object that is put and got


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        start = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "runtime.serve",
            "--port",
            str(self.port),
            "--data",
            str(folder),
            *options,
        ]
        self.log = folder.with_suffix(".log").open("w+")
        self.process = subprocess.Popen(command, stderr=self.log)
        while not self._ready():
            if self.process.poll() is not None:
                raise RuntimeError(Path(self.log.name).read_text()[-1000:])
            time.sleep(0.1)
        self.took = time.perf_counter() - start

    def _ready(self) -> bool:
        try:
            return self.ask("GET", "/readyz") == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: dict | None = None) -> int:
        """Return the status of an answer, once that is whole."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    def draw(self, **change) -> float:
        """Return the seconds that a request takes."""
        start = time.perf_counter()
        status = self.ask("POST", "/v1/generate", {**SHORT, **change})
        if status != 200:
            raise RuntimeError(f"/v1/generate: status {status}")
        return time.perf_counter() - start

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


def processes() -> dict[str, psutil.Process]:
    """Return the cluster's processes by their names."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        for name, part in PROCESSES.items():
            if line.startswith(part) or (part in line and not part.startswith("ray::")):
                found[name] = process
    return found


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure(requests: int) -> Iterator[tuple[str, float, str]]:
    """Yield what is measured: its name, its value and its unit."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Server(Path(folder) / "plain")
        ray = Server(Path(folder) / "ray", "--ray")
        try:
            yield "start, plain", plain.took, "s"
            yield "start, with a cluster of this machine", ray.took, "s"
            found = processes()
            for server in (plain, ray):
                for _ in range(5):
                    server.draw()
            before = {name: cpu(process) for name, process in found.items()}
            times = [(plain.draw(), ray.draw()) for _ in range(requests)]
            for name, each in zip(("plain", "on Ray"), zip(*times, strict=True), strict=True):
                yield f"a request of one step, {name}", 1000 * statistics.median(each), "ms"
            yield "Ray's part of it", 1000 * statistics.median(b - a for a, b in times), "ms"
            for name, process in found.items():
                yield f"{name}, CPU a request", 1000 * (cpu(process) - before[name]) / requests, "ms"
            mark = cpu(found["ingress"])
            for _ in range(requests // 2):
                ray.draw(steps=1 + MORE, stream=True)
            whole, alone = cpu(found["ingress"]) - mark, (mark - before["ingress"]) / requests
            yield (
                "ingress, CPU a step that a client follows",
                1000 * (2 * whole / requests - alone) / MORE,
                "ms",
            )
            for name, process in {"plain": psutil.Process(plain.process.pid), **found}.items():
                yield f"{name}, memory", process.memory_info().rss / MIB, "MiB"
        finally:
            plain.close()
            ray.close()
    with cluster():
        yield from store()


@contextmanager
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, logging_level="error", object_store_memory=40 * BLOCK)
    try:
        yield
    finally:
        ray.shutdown()


def store() -> Iterator[tuple[str, float, str]]:
    """Yield how fast objects go into the store, and come out of it copied."""
    import ray

    block, rates = np.random.default_rng(0).integers(0, 255, BLOCK, np.uint8), {"put": [], "get": []}
    for _ in range(30):
        start = time.perf_counter()
        reference = ray.put(block)
        middle = time.perf_counter()
        np.copyto(block, ray.get(reference))
        rates["put"].append(BLOCK / (middle - start) / 1e9)
        rates["get"].append(BLOCK / (time.perf_counter() - middle) / 1e9)
        del reference
    for name, each in rates.items():
        yield f"object store, {name}", statistics.median(each), "GB/s"


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: run(options))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.cluster", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--requests", type=int, default=100, help="one after the other (default %(default)s)")
    parser.add_argument("--out", type=Path, default=results_folder(), help="default %(default)s")
    return parser


def run(options: argparse.Namespace) -> None:
    check_counts(requests=options.requests)
    check_out(options.out)
    import ray

    rows = []
    for name, value, unit in measure(options.requests):
        rows.append(
            {"measure": name, "value": round(value, 3), "unit": unit, "ray": ray.__version__, **environment()}
        )
        say(f"{name}: {value:.3f} {unit}")
    write_rows(options.out / "cluster.csv", rows)


if __name__ == "__main__":
    sys.exit(main())
