"""A server in a process of its own, to be looked at from outside and to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.server import Client


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
