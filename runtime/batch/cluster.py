"""The loop on Ray Data: requests go out in small blocks, pictures come back, and this process alone writes them."""

from __future__ import annotations

import argparse
import json
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from runtime.batch.draw import Drawer, Picture, Turn, missing, refuse, take
from runtime.batch.orders import Ordered
from runtime.batch.requests import Line
from runtime.batch.results import Results
from runtime.capabilities import Capabilities
from runtime.cli.cluster import replicas, share
from runtime.cli.load import load
from runtime.serve.admission import ROWS
from runtime.serve.identity import model_hash
from runtime.serve.orders import heard
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Generate

# Blocks that a replica has at a time: while the last of one are drawn, the next one's fill the step
TURNS = 2


def draw(lines: Iterable[Line], options: argparse.Namespace, results: Results) -> Iterator[str]:
    """Draw what is missing on the cluster. Yields what became of each picture as it does, as `draw.draw` does.

    A replica that dies has its block drawn again, elsewhere. Paths of REQUESTS have to be those of every machine.
    """
    ordered = Ordered(Capabilities(), model_hash(options), deterministic=options.deterministic)
    items, sources = [], {}
    for found in missing(lines, ordered, results):
        if isinstance(found, str):
            yield found
            continue
        id, body, line = found
        base, sources[id] = str(line.base.absolute()), line
        items.append({"id": id, "source": line.source, "base": base, "body": body.model_dump_json()})
    if not items:
        return
    (taken, gpus), rows = share(options), options.rows or ROWS
    least, most = replicas(options, gpus)
    DataContext.get_current().enable_progress_bars = False  # there is one already
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    pictures = (
        ray.data.from_items(items)
        .repartition(target_num_rows_per_block=max(1, rows // 2))  # a step's, with guidance
        .map_batches(
            Replica,
            batch_size=None,
            fn_constructor_args=(options,),
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_concurrent_calls_per_actor=TURNS,
                enable_true_multi_threading=True,
            ),
            **taken,
        )
    )
    for row in pictures.iter_rows():
        picture = picture_of(row)
        if picture.error is None or picture.error.status >= 500:
            yield take(picture, results)
        else:
            picture.warn()
            yield refuse(sources[row["id"]], picture.error, results)


class Replica:
    """A pipeline in a process of its own, that draws blocks of requests."""

    def __init__(self, options: argparse.Namespace):
        self._held = ExitStack()
        self._held.enter_context(heard())  # for as long as the process lives
        pipe = load(options)
        # Without the model's hash: the ids are the driver's
        self.ordered = Ordered(pipe.capabilities, "", deterministic=options.deterministic)
        self.drawer, self._ordering = Drawer(pipe, options, options.rows), threading.Lock()

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Return a row for each request: a PNG, or the error."""
        turn, found = Turn(self.drawer), []
        for id, source, base, body in zip(
            *(block[name] for name in ("id", "source", "base", "body")), strict=True
        ):
            try:
                with self._ordering:  # which reads pictures from one folder at a time
                    order = self.ordered.order(Generate.model_validate_json(body), Path(base))
            except Refusal as error:
                found.append(Picture(id, source, error=error))
                continue
            while not turn.room:
                found.append(turn.next())
            turn.submit(id, source, order)
        while turn.busy:
            found.append(turn.next())
        return rows_of(found)


def rows_of(pictures: list[Picture]) -> dict[str, list[Any]]:
    """Return a block's columns."""
    columns: dict[str, list[Any]] = {
        name: [getattr(each, name) for each in pictures] for name in ("id", "source")
    }
    columns["png"] = [each.png or b"" for each in pictures]
    columns["seed"] = [each.seed or 0 for each in pictures]
    columns["seconds"] = [each.seconds or 0.0 for each in pictures]
    columns["status"] = [each.error.status if each.error else 0 for each in pictures]
    columns["error"] = [str(each.error or "") for each in pictures]
    columns["warnings"] = [json.dumps(each.warnings) for each in pictures]
    return columns


def picture_of(row: dict[str, Any]) -> Picture:
    """Return a row as what a replica has handed back."""
    warnings = json.loads(row["warnings"])
    if row["status"]:
        error = Refusal(row["status"], row["error"])
        return Picture(row["id"], row["source"], error=error, warnings=warnings)
    return Picture(row["id"], row["source"], row["png"], row["seed"], row["seconds"], warnings=warnings)
