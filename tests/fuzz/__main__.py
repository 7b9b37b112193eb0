"""python -m tests.fuzz [--count 20000] [--seed 0] [--target NAME ...] [--out FILE.csv]

Gives made-up files and arguments to whatever reads strangers': each is read, or refused in one line. Prints what came
of them, target by target; exit code 1 where an exception was another, a call hung, a process was started, a host
was asked for, or memory grew beyond the limit. An input is made again by its target, seed and number.
"""

from __future__ import annotations

import argparse
import csv
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.campaign import MOST_BYTES, Outcome, run
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[1])
    parser.add_argument("--count", type=int, default=20_000, help="inputs of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only these; all by default")
    parser.add_argument("--out", type=Path, help="the table, as CSV")
    options = parser.parse_args()
    chosen = {name: TARGETS[name] for name in options.target or TARGETS}
    whole, found, start = sum(share for share, _ in chosen.values()), [], time.monotonic()
    print(f"{'':18}{'inputs':>8}{'read':>8}{'refused':>9}{'foreign':>9}{'hung':>6}{'slowest':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (share, make) in chosen.items():
            count = round(options.count * share / whole)
            found.append(run(name, make, count, options.seed, Path(folder)))
            print(line(found[-1]), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    failures = [failure for outcome in found for failure in outcome.failures]
    for failure in failures[:100]:
        print(f"\n{failure}")
    inputs = sum(outcome.inputs for outcome in found)
    seconds = time.monotonic() - start
    print(f"\n{inputs:,} inputs, {len(failures)} failures, {peak / 2**20:,.0f} MiB at most, {seconds:.0f} s")
    if options.out:
        with options.out.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["target", "inputs", "read", "refused", "foreign", "hung", "slowest_s"])
            table.writerows(
                [o.name, o.inputs, o.read, o.refused, o.foreign, o.hung, f"{o.slowest:.2f}"] for o in found
            )
    return int(bool(failures) or peak > MOST_BYTES)


def line(o: Outcome) -> str:
    return f"{o.name:18}{o.inputs:8}{o.read:8}{o.refused:9}{o.foreign:9}{o.hung:6}{o.slowest:8.2f} s"


if __name__ == "__main__":
    sys.exit(main())
