"""Which samples are only drawn, and which are trained on."""

from __future__ import annotations

from collections.abc import Callable

from runtime.errors import InputError
from training.data.stores import Entry


def split(
    entries: list[Entry], held_out: int, say: Callable[[str], None] = print
) -> tuple[list[Entry], list[Entry]]:
    """Return those to draw and those to train on; which ones are held out depends on their files alone.

    Copies of those held out are not trained on; `say` is told how many there are. Raises InputError where nothing is
    left to train on.
    """
    keys = sorted({e.key for e in entries})
    if len(keys) <= held_out:
        copies = f", of which {len(keys)} differ" if len(keys) < len(entries) else ""
        raise InputError(
            f"validation_samples {held_out}: there are only {len(entries)} samples to train on{copies}; "
            "expected more different ones, or --validation-samples 0"
        )
    chosen = set(keys[:held_out])
    apart = [e for e in entries if e.key in chosen]
    if len(apart) > held_out:
        say(
            f"{len(apart) - held_out} samples are copies of those held out for validation and are not trained on"
        )
    first: dict[str, Entry] = {}
    for entry in apart:
        first.setdefault(entry.key, entry)
    return list(first.values()), [e for e in entries if e.key not in chosen]
