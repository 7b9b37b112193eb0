"""python -m benchmarks.cluster.simulation [--costs file.csv] [--seconds 60] [--out folder]

How a cluster of 1 to 1,000 replicas would do, simulated: requests come at random (Poisson), pass the proxy and the
ingress one by one, go to the less busy of two replicas (Serve's router), and there share steps as in the engine. The
time of a step of SDXL, of its text and of its decoding are those measured on an H200; what a request costs proxy and
ingress is what `python -m benchmarks.cluster` has measured here. Writes <out>/cluster_simulation.csv and .png.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import random
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.measure import (
    RESULTS,
    check_counts,
    check_out,
    environment,
    results_folder,
    save_figure,
    write_rows,
)
from runtime.cli.command import Parser, exit_code
from runtime.errors import InputError

REPLICAS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LOAD = 0.8  # of what the replicas can draw
MEASURED = RESULTS / "nvidia-h200" / "stages.csv", "picture, ours, CUDA graph"
CONNECTIONS = 512  # that the ingress has at a time: more are refused
AT_ONCE = 8  # requests in a step: 16 rows, two of each


@dataclass(frozen=True)
class Costs:
    """Seconds. step: of one picture; of several as often as there are, since one fills the GPU: no step is cheaper
    for being shared. around: of a picture's text, adapter and decoding, during which its replica takes no step. proxy,
    ingress: of one request, in which they do nothing else.
    """

    step: float
    around: float
    steps: int
    proxy: float
    ingress: float

    @property
    def picture(self) -> float:
        """Return the seconds of a replica that a picture takes."""
        return self.step * self.steps + self.around


@dataclass(eq=False)
class Station:
    """Something that serves one request after the other."""

    seconds: float
    free: float = 0.0  # when it is

    def pass_on(self, now: float) -> float:
        """Return when a request that comes now has been served."""
        self.free = max(self.free, now) + self.seconds
        return self.free


@dataclass(eq=False)
class Replica:
    """Requests that wait, and those that run: when each came, and how many steps it has to go."""

    waiting: deque = field(default_factory=deque)
    running: list = field(default_factory=list)
    at_work: bool = False

    @property
    def ongoing(self) -> int:
        return len(self.waiting) + len(self.running)


def simulate(costs: Costs, count: int, rate: float, seconds: float, seed: int = 0) -> dict[str, float]:
    """Return pictures a second, latencies, and the share of its time in which the ingress is busy.

    count: replicas. rate: requests a second, which come for so many seconds; the first fifth is not counted.
    """
    choose, stations = random.Random(seed), (Station(costs.proxy), Station(costs.ingress))
    replicas = [Replica() for _ in range(count)]
    events: list[
        tuple[float, int, Replica | None, float]
    ] = []  # when, a number that orders equals, whose, came
    number, refused, now, latencies = 0, 0, 0.0, []
    while (now := now + choose.expovariate(rate)) < seconds:
        if (stations[1].free - now) > CONNECTIONS * costs.ingress:
            refused += now >= seconds / 5
            continue
        at = now
        for station in stations:
            at = station.pass_on(at)
        number += 1
        heapq.heappush(events, (at, number, None, now))
    while events and events[0][0] < seconds:
        at, _, replica, came = heapq.heappop(events)
        if replica is None:  # a request leaves the ingress
            pair = choose.sample(replicas, min(2, count))
            replica = min(pair, key=lambda each: each.ongoing)
            replica.waiting.append(came)
            if replica.at_work:
                continue
        until = tick(replica, costs, at, latencies)
        replica.at_work = until is not None
        if until is not None:
            number += 1
            heapq.heappush(events, (until, number, replica, 0.0))
    counted = [done - came for came, done in latencies if came >= seconds / 5]
    drawn = [done for _, done in latencies if done >= seconds / 5]
    return {
        "replicas": count,
        "sent_per_s": round(rate, 3),
        "pictures_per_s": round(len(drawn) / (0.8 * seconds), 3),
        "refused_per_s": round(refused / (0.8 * seconds), 3),
        "p50_s": round(float(np.percentile(counted, 50)), 3) if counted else float("nan"),
        "p95_s": round(float(np.percentile(counted, 95)), 3) if counted else float("nan"),
        "ingress_busy": round(min(1.0, rate * max(costs.proxy, costs.ingress)), 3),
    }


def tick(replica: Replica, costs: Costs, now: float, done: list[tuple[float, float]]) -> float | None:
    """Admit what fits and take a step. Returns when it ends; None where there is nothing to do."""
    while replica.waiting and len(replica.running) < AT_ONCE:
        replica.running.append([replica.waiting.popleft(), costs.steps])
        now += costs.around / 2
    if not replica.running:
        return None
    now += costs.step * len(replica.running)
    for request in list(replica.running):
        request[1] -= 1
        if request[1] == 0:
            now += costs.around / 2
            replica.running.remove(request)
            done.append((request[0], now))
    return now


def measured(costs: Path) -> Costs:
    """Return the costs from the files that have them. Raises InputError."""
    try:
        with costs.open() as file:
            own = {row["measure"]: float(row["value"]) for row in csv.DictReader(file)}
        with MEASURED[0].open() as file:
            row = next(each for each in csv.DictReader(file) if each["case"] == MEASURED[1])
        steps = int(row["steps"])
        around = (float(row["p50_ms"]) - float(row["denoise_ms"])) / 1000
        step = float(row["denoise_ms"]) / 1000 / steps
        return Costs(
            step, around, steps, own["proxy, CPU a request"] / 1000, own["ingress, CPU a request"] / 1000
        )
    except (OSError, KeyError, ValueError, StopIteration) as error:
        raise InputError(f"--costs {costs}: {error}; run python -m benchmarks.cluster first") from error


def plot(rows: Sequence[Mapping], costs: Costs, path: Path) -> None:
    """Draw pictures a second, and the latency that one in twenty passes, over the number of replicas."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for ingress, colour, style in (("one", "#0072B2", "o-"), ("free", "#E69F00", "s--")):
        own = [row for row in rows if row["ingress"] == ingress]
        label = "one ingress, as measured" if ingress == "one" else "an ingress that costs nothing"
        counts = [row["replicas"] for row in own]
        above.loglog(counts, [row["pictures_per_s"] for row in own], style, color=colour, label=label)
        below.semilogx(counts, [row["p95_s"] for row in own], style, color=colour, label=label)
    most = 1 / max(costs.proxy, costs.ingress)
    above.axhline(most, color="#999999", linewidth=1)
    above.annotate(
        f"{most:.0f} a second pass one ingress",
        (1, most),
        textcoords="offset points",
        xytext=(0, 4),
        fontsize=8,
    )
    above.set_ylabel("pictures a second")
    below.set_ylabel("p95, seconds")
    below.set_ylim(0)
    below.set_xlabel("replicas (SDXL, 1024 x 1024, 30 steps, an H200 each; simulated)")
    above.set_title(f"Poisson arrivals at {LOAD:.0%} of what the replicas can draw", fontsize=10, loc="left")
    above.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: run(options))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.cluster.simulation", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "--costs", type=Path, default=results_folder() / "cluster.csv", help="default %(default)s"
    )
    parser.add_argument("--seconds", type=int, default=60, help="simulated (default %(default)s)")
    parser.add_argument("--out", type=Path, default=results_folder(), help="default %(default)s")
    return parser


def run(options: argparse.Namespace) -> None:
    check_counts(seconds=options.seconds)
    check_out(options.out)
    costs, rows = measured(options.costs), []
    free = Costs(costs.step, costs.around, costs.steps, 0.0, 0.0)
    for count in REPLICAS:
        for ingress, each in (("one", costs), ("free", free)):
            seconds = options.seconds * max(1, 10 // count)  # few requests come to few replicas
            found = simulate(each, count, LOAD * count / costs.picture, seconds)
            rows.append({"ingress": ingress, **found})
            print(rows[-1], flush=True)
    about = {
        f"{name}_cost_s": round(getattr(costs, name), 6) for name in ("step", "around", "proxy", "ingress")
    }
    write_rows(options.out / "cluster_simulation.csv", [{**row, **about, **environment()} for row in rows])
    plot(rows, costs, options.out / "cluster_simulation.png")


if __name__ == "__main__":
    sys.exit(main())
