"""A campaign against one target: every input is read, or refused in one line, soon and in this process."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from runtime.errors import InputError
from tests.fuzz.targets import Make

MOST_SECONDS = 20  # of one input
MOST_BYTES = 2 * 2**30  # of the process
LONGEST = 2100  # characters of an error's line: what was given may be quoted
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "socket.connect",
)


class Hung(BaseException):
    """An input took MOST_SECONDS."""


class Forbidden(BaseException):
    """An input started a process or asked another host."""


@dataclass
class Outcome:
    """What came of a target's inputs. failures: how to make each bad one again, and what it did."""

    name: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    foreign: int = 0
    hung: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


def run(name: str, make: Make, count: int, seed: int, folder: Path) -> Outcome:
    """Give a target `count` inputs, each made in an empty folder."""
    outcome = Outcome(name)
    for number in range(count):
        own = folder / "input"
        own.mkdir()
        call = make(generator(name, seed, number), own)
        start = monotonic()
        try:
            with limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
            outcome.read += 1
        except InputError as error:
            outcome.refused += 1
            if "\n" in str(error) or not str(error) or len(str(error)) > LONGEST:
                outcome.failures.append(f"{name} {seed} {number}: not one line: {str(error)[:500]!r}")
        except Hung:
            outcome.hung += 1
            outcome.failures.append(f"{name} {seed} {number}: hung\n{traceback.format_exc(limit=-5)}")
        except (Exception, Forbidden):
            outcome.foreign += 1
            outcome.failures.append(f"{name} {seed} {number}:\n{traceback.format_exc(limit=-5)}")
        outcome.inputs += 1
        outcome.slowest = max(outcome.slowest, monotonic() - start)
        shutil.rmtree(own)
    return outcome


def generator(name: str, seed: int, number: int) -> random.Random:
    """Return what an input is made with."""
    return random.Random(f"{name} {seed} {number}")


_watching = False


def _audit(event: str, _: tuple) -> None:
    if _watching and event.startswith(FORBIDDEN):
        raise Forbidden(event)


sys.addaudithook(_audit)


@contextmanager
def limited() -> Iterator[None]:
    """Raise Hung after MOST_SECONDS, Forbidden where the block starts a process or connects to a host."""
    global _watching

    def late(*_) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
