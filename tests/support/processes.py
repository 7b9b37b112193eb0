"""Commands that start processes of their own: none outlives its test, and one that hangs says where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import psutil

ON_TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]


def run(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does. After so many seconds all its processes print their stacks and end.

    Raises AssertionError then, with those stacks and what the command had said.
    """
    environment = {**(environment or os.environ), "PYTHONFAULTHANDLER": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as started:
        try:
            output, errors = started.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _abort(started.pid)
            output, errors = started.communicate()
            raise AssertionError(f"not done after {seconds:g} s\n{output}\n{errors}") from None
        finally:
            _end(started.pid)
    return subprocess.CompletedProcess(command, started.returncode, output, errors)


def _abort(pid: int) -> None:
    """Have the processes that this one started, and then itself, print where they are, which is what SIGABRT does."""
    processes = psutil.Process(pid).children(recursive=True)
    for process in (*processes, psutil.Process(pid)):
        process.send_signal(signal.SIGABRT)
    _, left = psutil.wait_procs(processes, timeout=20)
    for process in left:
        process.kill()


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
