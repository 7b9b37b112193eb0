"""What a build shows of its stages: a bar while one runs, a line with its time and memory when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

Report = Callable[..., None]  # ([what is being done,] steps done, steps)
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def stage(name: str, say: Callable[[str], None]) -> Iterator[tuple[Report, dict[str, float]]]:
    """Run a stage: what to call with its progress, and a dictionary that holds its cost afterwards.

    The cost: "seconds", and "peak_bytes" of the process's memory during the stage (Linux only).
    """
    cost: dict[str, float] = {}
    start, measured = time.perf_counter(), _reset_peak()
    with tqdm(total=1, desc=name, bar_format=BAR, dynamic_ncols=True, leave=False, disable=None) as bar:

        def progress(*report) -> None:
            *phase, done, total = report
            bar.set_postfix_str(phase[0] if phase else "", refresh=False)
            if bar.total != total or done < bar.n:  # another phase counts anew
                bar.reset(total)
            bar.update(done - bar.n)

        yield progress, cost
    cost["seconds"] = round(time.perf_counter() - start, 2)
    memory = ""
    if measured:
        cost["peak_bytes"] = _peak()
        memory = f"  peak {cost['peak_bytes'] / 2**30:.1f} GiB"
    say(f"{name:24} {cost['seconds']:7.1f} s{memory}")


BAR = "{desc:24} {bar:20} {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def _reset_peak() -> bool:
    """Have the kernel count the process's peak memory anew; False where it cannot."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return STATUS.is_file()


def _peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
