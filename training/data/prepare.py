"""From a source to what training reads: latents, text and conditions, computed once and kept in the cache.

Samples are known by the hash of their files, so a pass over a source that was seen before finds everything done, and
one over a source that has grown computes what is new.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from runtime.errors import InputError
from runtime.loading.load import Model
from runtime.machine.files import replacing, write_json
from training.config import TrainConfig
from training.data import workers
from training.data.cache import digest
from training.data.encode import Encoder
from training.data.reader import Reader
from training.data.sample import Source
from training.data.stores import Entry, Stores


def prepare(
    source: Source, stores: Stores, folder: Path, model: Model, config: TrainConfig, accelerator: Accelerator
) -> list[Entry]:
    """Return the samples in the source's order, with everything that training needs of them in the stores.

    Where the source's fingerprint is known and nothing is missing, no sample is read. Unreadable ones are listed in
    OUT/skipped.txt, files that nothing reads in OUT/unused.txt. Raises InputError where the unreadable ones are more
    than `max_skipped`, where there is no sample left, and where something is missing that `require_cache` forbids to
    compute.
    """
    # of the first process: another may see other times of the same files
    source.fingerprint = broadcast_object_list([source.fingerprint])[0]
    index = folder / f"index-{_index_key(source, stores, config)}.json"
    known = _read_index(index)
    lacking = ["the list of samples"] if known is None else stores.lacking(known, config.crops)
    if lacking:
        if config.require_cache:
            others = [line for store in stores.all() for line in store.others()]
            raise InputError(
                f"cache {folder}: it lacks {', '.join(lacking)}"
                + "".join(f"; it has {line}" for line in others)
            )
        known = _pass(source, stores, model, config, accelerator)
        if accelerator.is_main_process:
            write_json([asdict(e) for e in known], index, "cache")
    elif source.unused is not None:
        _report_unused(source.unused, config, accelerator)
    return known


def _pass(source, stores: Stores, model: Model, config: TrainConfig, accelerator: Accelerator) -> list[Entry]:
    """Read all of the source, each process its part, and compute what is missing."""
    reader = Reader(source, stores, config, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(reader, batch_size=None, collate_fn=_as_is, **workers.options(config.workers))
    encoder = Encoder(model, stores, config, accelerator.device)
    found, skipped, unused = [], [], []
    for item in tqdm(
        loader, desc="preparing", unit=" samples", disable=not accelerator.is_local_main_process
    ):
        if "broken" in item:
            raise InputError(item["broken"])
        for message in item["warned"]:
            warnings.warn(message, stacklevel=2)
        unused += [(item["number"], name, "nothing here reads such a file") for name in item["unused"]]
        if "error" in item:
            skipped.append((item["number"], item["name"], item["error"]))
            continue
        found.append((item["number"], item["entry"]))
        encoder.add(item)
    encoder.finish()
    for store in stores.all():
        store.flush()
    accelerator.wait_for_everyone()
    for store in stores.all():
        store.refresh()
    found, skipped, unused = (sorted(gather_object(rows)) for rows in (found, skipped, unused))
    _report_unused(
        [*(source.unused or ()), *(f"{name}: {why}" for _, name, why in unused)], config, accelerator
    )
    _report_skipped(found, skipped, config, accelerator)
    return [Entry(*fields) for _, fields in found]


def _list(lines: list[str], name: str, config: TrainConfig, accelerator: Accelerator) -> Path:
    """Write a list into the run's folder, in place of that of an earlier pass; none where there is nothing to list."""
    path = Path(config.out) / name
    if accelerator.is_main_process and not lines:
        path.unlink(missing_ok=True)
    elif accelerator.is_main_process:
        with replacing(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), "utf-8", errors="backslashreplace")
    return path


def _report_unused(lines: list[str], config: TrainConfig, accelerator: Accelerator) -> None:
    path = _list(lines, "unused.txt", config, accelerator)
    if lines:
        listed = f"listed in {path}; the first: {lines[0]}"
        accelerator.print(f"data {config.data}: {len(lines)} files or names are not used, {listed}")


def _report_skipped(found: list, skipped: list, config: TrainConfig, accelerator: Accelerator) -> None:
    path = _list([f"{name}: {why}" for _, name, why in skipped], "skipped.txt", config, accelerator)
    total = len(found) + len(skipped)
    first = f"; the first: {skipped[0][1]}: {skipped[0][2]}" if skipped else ""
    if not found:
        raise InputError(f"data {config.data}: none of {total} samples can be used{first}")
    if len(skipped) > config.max_skipped * total:
        raise InputError(
            f"data {config.data}: {len(skipped)} of {total} samples cannot be used, more than max_skipped "
            f"{config.max_skipped:g}; they are listed in {path}{first}"
        )
    if skipped:
        accelerator.print(f"skipped {len(skipped)} of {total} samples, listed in {path}{first}")


def _index_key(source: Source, stores: Stores, config: TrainConfig) -> str:
    return digest(source.fingerprint, *(store.folder.name for store in stores.all()), config.condition)[:12]


def _read_index(path: Path) -> list[Entry] | None:
    try:
        entries = json.loads(path.read_text("utf-8"))
        return [Entry(e["name"], e["key"], e["caption"], tuple(e["bucket"])) for e in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_is(item: dict) -> dict:
    return item
