"""python -m benchmarks.serving [--model embedded | --engine folder] [--clients 1 8 16] [--rates 0.5 0.9 1.5] [--quick]

Many clients at one pipeline. Compares a server that takes a step of every request at a time ("shared steps",
`runtime.serve.engine.Engine`) with one request after the other ("one by one"), and with what other servers of pictures
do ("batches of alike": requests of equal size, steps, guidance and scheduler are drawn together from start to finish).
In one process and in turn, on the same requests at the same times, without HTTP. Writes <out>/serving.csv and
serving.png.

The load: prompts, half of them with a masked control, 4 to 30 steps, three quarters with guidance. Closed loop: each
client sends its next request when its last one is done. Open loop: requests come at random (Poisson), at rates
relative to what "one by one" can draw. A sample of the pictures is compared with the same requests drawn alone.

In favour of "batches of alike": other masks, or none, do not keep requests apart; members come from anywhere in the
queue. Against it: texts are encoded and pictures decoded one by one, as they are in "shared steps".
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

from benchmarks.measure import check_counts, check_out, environment, results_folder, save_figure, write_rows
from benchmarks.serving_load import SHORT, closed, make_limits, make_orders, opened, running
from benchmarks.serving_policies import Baseline, Notes, make_policies
from runtime import LocalControlPipeline
from runtime.cli.command import Parser, exit_code
from runtime.errors import InputError
from runtime.sampling.result import Result
from runtime.serve.admission import most_rows
from runtime.serve.engine import Engine
from runtime.serve.orders import Order
from runtime.serve.work import Watcher

matplotlib.use("agg")
from matplotlib import pyplot as plt

FULL = {"clients": [1, 2, 4, 8, 16], "rates": [0.5, 0.9, 1.5], "requests": 64, "repeats": 3}
QUICK = {"clients": [4], "rates": [1.5], "requests": 8, "repeats": 1}
SAMPLE = 8  # requests, at least, whose pictures are compared
# of latents, beside their largest number; rows of other batches are rounded otherwise
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
# Okabe and Ito's palette, which the colour-blind can tell apart
PALETTE = {"one by one": "#999999", "batches of alike": "#E69F00", "shared steps": "#0072B2"}
SHOWN = ("images_per_s", "steps_per_s", "p50_ms", "p95_ms", "short_p95_ms", "first_p50_ms", "first_p95_ms")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: run(options))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.serving", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--model", default="embedded", help="what runtime.generate's --model takes")
    parser.add_argument("--adapter", help="of the control (default: the model's canny)")
    parser.add_argument("--engine", metavar="FOLDER", help="run on engines of export.build_engine")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as for runtime.generate")
    parser.add_argument("--clients", type=int, nargs="*", help=f"closed loop (default {FULL['clients']})")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="*",
        help=f"open loop, times the capacity of one by one (default {FULL['rates']})",
    )
    parser.add_argument("--requests", type=int, help=f"of each run (default {FULL['requests']})")
    parser.add_argument(
        "--repeats", type=int, help=f"runs of each load and scheduler (default {FULL['repeats']})"
    )
    parser.add_argument("--rows", type=int, default=0, help="of the UNet in a step (default: by the machine)")
    parser.add_argument("--window", type=float, default=0.05, help="seconds for which a batch of alike waits")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {QUICK}")
    parser.add_argument("--out", type=Path, default=results_folder(), help="default %(default)s")
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure every load, write, plot."""
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    check(options)
    pipe = load(options)
    limits = make_limits(options.rows or most_rows(pipe), options.requests)
    orders, policies = make_orders(pipe, options.requests), make_policies(pipe, limits, options.window)
    sample = orders[:: max(1, len(orders) // SAMPLE)]
    alone = {order.request.seed: pipe.draw(order.request) for order in sample}
    about = {
        "requests": options.requests,
        "most_rows": limits.rows,
        "window_ms": round(options.window * 1e3, 3),
    }
    about |= {"model": options.model, "engine": options.engine or "", "size": pipe.default_size}
    about |= {"dtype": str(pipe.dtype).removeprefix("torch."), **environment()}
    measured: list[dict] = []
    for row in rows_of(policies, orders, options, partial(compare, alone, TOLERANCES[pipe.dtype])):
        measured.append(row | about)
        write_rows(options.out / "serving.csv", measured)
        print(line(row, f" repeat {row['repeat']}"), flush=True)
    print(summary(measured))
    plot(measured, options.out / "serving.png")


def check(options: argparse.Namespace) -> None:
    """Raise InputError, naming the option, for what cannot be measured."""
    check_out(options.out)
    check_counts(requests=options.requests, repeats=options.repeats)
    for count in options.clients:
        check_counts(clients=count)
    for rate in options.rates:
        if not 0 < rate < float("inf"):
            raise InputError(f"rates {rate:g}: expected numbers above 0")
    if not options.clients and not options.rates:
        raise InputError("clients: none, and no rates; expected one of the two")
    if options.rows < 0:
        raise InputError(f"rows {options.rows}: expected 1 or more, or 0 for what fits the machine")
    if not 0 <= options.window < float("inf"):
        raise InputError(f"window {options.window:g}: expected seconds, 0 or more")


def load(options: argparse.Namespace) -> LocalControlPipeline:
    """Return the pipeline. Raises InputError where no adapter can read a control."""
    adapters = {"canny": options.adapter} if options.adapter else None
    if options.engine:
        pipe = LocalControlPipeline.from_engine(options.engine, adapters)
    else:
        pipe = LocalControlPipeline.from_pretrained(options.model, adapters, dtype=options.dtype)
    if not pipe.adapters and not pipe.controlnets:
        raise InputError(f"adapter: {options.engine or options.model} has none; name one")
    return pipe


def rows_of(
    policies: dict[str, Callable[[Watcher], Engine | Baseline]],
    orders: Sequence[Order],
    options: argparse.Namespace,
    compare: Callable[[str, Notes], None],
) -> Iterator[dict]:
    """Yield a row for each load, repeat and policy. compare: raises where a picture is not what it should be.

    A first run of each policy is not counted; the capacity of "one by one" is the median of its closed loops.
    """
    most = max(options.clients, default=1)

    def measure(name: str, drive: Callable[[Engine | Baseline, Notes, Sequence[Order]], None]) -> dict:
        notes = Notes()
        with running(policies[name](notes)) as policy:
            drive(policy, notes, orders)
        compare(name, notes)
        return figures(notes)

    warm = {name: measure(name, partial(closed, clients=most)) for name in policies}
    capacities = [warm["one by one"]["images_per_s"]]
    for clients in options.clients:
        for repeat in range(options.repeats):
            for name in policies:
                row = measure(name, partial(closed, clients=clients))
                capacities += [row["images_per_s"]] * (name == "one by one")
                load = {"loop": "closed", "clients": clients, "rate": "", "sent_per_s": ""}
                yield {"policy": name, **load, "repeat": repeat, **row}
    capacity = statistics.median(capacities)
    for rate in options.rates:
        for repeat in range(options.repeats):
            for name in policies:
                row = measure(name, partial(opened, rate=rate * capacity, seed=repeat))
                load = {"loop": "open", "clients": "", "rate": rate, "sent_per_s": round(rate * capacity, 4)}
                yield {"policy": name, **load, "repeat": repeat, **row}


def figures(notes: Notes) -> dict:
    """Return what is reported of a run. first: from sending a request until its first step is done."""
    seconds = max(notes.ends.values()) - min(work.created for work in notes.ends)
    steps = {work: work.order.request.run_steps for work in notes.ends}
    whole = {work: end - work.created for work, end in notes.ends.items()}
    first = [end - work.created for work, end in notes.first.items()]
    short = [taken for work, taken in whole.items() if steps[work] <= SHORT]
    return {
        "images_per_s": round(len(notes.ends) / seconds, 4),
        "steps_per_s": round(sum(steps.values()) / seconds, 3),
        "p50_ms": percentile(whole.values(), 50),
        "p95_ms": percentile(whole.values(), 95),
        "short_p95_ms": percentile(short, 95),
        "first_p50_ms": percentile(first, 50),
        "first_p95_ms": percentile(first, 95),
        "rows_per_tick": round(statistics.mean(notes.rows), 3),
    }


def percentile(seconds: Iterable[float], share: int) -> float | str:
    """Return a percentile in milliseconds; empty where nothing was timed."""
    found = list(seconds)
    return round(float(np.percentile(found, share)) * 1e3, 2) if found else ""


def compare(alone: dict[int, Result], tolerance: float, name: str, notes: Notes) -> None:
    """Raise RuntimeError where a request of the sample was drawn otherwise than alone, beyond rounding."""
    found = {work.order.request.seed: result for work, result in notes.results.items()}
    for seed, expected in alone.items():
        off = (found[seed].latents - expected.latents).abs().max() / expected.latents.abs().max()
        pictures = (np.asarray(result.images[0], dtype=int) for result in (found[seed], expected))
        levels = int(np.abs(np.subtract(*pictures)).max())
        if not off < tolerance and levels > 1:
            message = f"latents off by {off:.2g} of their largest, the picture by {levels} grey levels"
            raise RuntimeError(f"{name}: request {seed} is not what it is alone: {message}")


def line(row: dict, more: str = "") -> str:
    """Return a row as a line of the table."""
    load = f"{row['clients']} clients" if row["loop"] == "closed" else f"rate {row['rate']:g}"
    numbers = (f"{row[key]:9.2f}" if row[key] != "" else " " * 9 for key in (*SHOWN, "rows_per_tick"))
    return f"{row['policy']:17}{load:>11} {' '.join(numbers)}{more}"


def median_of(rows: Sequence[dict], key: str) -> float | str:
    """Return the median over the repeats; empty where nothing was timed."""
    found = [row[key] for row in rows if row[key] != ""]
    return statistics.median(found) if found else ""


def by_load(rows: Sequence[dict], loop: str, policy: str) -> dict[float, list[dict]]:
    """Return a policy's rows, one for each repeat, by the number of clients or the rate."""
    found: dict[float, list[dict]] = {}
    for row in rows:
        if (row["loop"], row["policy"]) == (loop, policy):
            found.setdefault(row["clients" if loop == "closed" else "rate"], []).append(row)
    return found


def summary(rows: Sequence[dict]) -> str:
    """Return the table of medians, and under it what sharing steps wins and costs."""
    heads = ("images/s", "steps/s", "p50 ms", "p95 ms", "short p95", "first p50", "first p95", "rows")
    lines = [f"\n{'':28} {' '.join(f'{head:>9}' for head in heads)}"]
    for loop in ("closed", "open"):
        for load in by_load(rows, loop, "shared steps"):
            for policy in PALETTE:
                own = by_load(rows, loop, policy)[load]
                lines.append(line(own[0] | {key: median_of(own, key) for key in (*SHOWN, "rows_per_tick")}))
    gain = ratios(rows, "closed", "images_per_s", "one by one")
    cost = ratios(rows, "open", "short_p95_ms", "batches of alike")
    lines += [f"shared steps / one by one, images/s, closed loop: {gain}"] * bool(gain)
    lines += [f"shared steps / batches of alike, p95 of short requests, open loop: {cost}"] * bool(cost)
    return "\n".join(lines)


def ratios(rows: Sequence[dict], loop: str, key: str, other: str) -> str:
    """Return "load: ratio" of shared steps to another policy: the median over the repeats, whose runs were in turn."""
    ours, theirs, found = by_load(rows, loop, "shared steps"), by_load(rows, loop, other), []
    unit = "clients" if loop == "closed" else "of capacity"
    for load in ours:
        pairs = zip(ours[load], theirs[load], strict=True)
        of_repeats = [a[key] / b[key] for a, b in pairs if "" not in (a[key], b[key])]
        if of_repeats:
            found.append(f"{load:g} {unit} {statistics.median(of_repeats):.2f}")
    return ", ".join(found)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Draw throughput over clients, and the p95 of short requests over the rate: each repeat, and the median."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    panels = (("closed", "images_per_s", 1), ("open", "short_p95_ms", 1e-3))
    for panel, (loop, key, unit) in zip(axes, panels, strict=True):
        for policy, colour in PALETTE.items():
            own = by_load(rows, loop, policy)
            points = [(x, row[key] * unit) for x, found in own.items() for row in found if row[key] != ""]
            panel.plot(*zip(*points, strict=True) if points else ((), ()), "o", color=colour, alpha=0.4)
            medians = sorted((x, statistics.median(y for at, y in points if at == x)) for x, _ in set(points))
            panel.plot(*zip(*medians, strict=True) if medians else ((), ()), color=colour, label=policy)
    axes[0].set(xlabel="clients, closed loop", ylabel="pictures a second")
    axes[0].set_ylim(bottom=0)
    axes[1].set(xlabel="requests sent, times what one by one can draw", ylabel="p95 of short requests, s")
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
