"""Numbers that change over the steps: keyframes, between which they are interpolated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from runtime.errors import InputError

Keyframes = tuple[tuple[float, float], ...]  # (fraction of the steps, value), in the order of the fractions
MOST = 100
LARGEST = 1e6
EXPECTED = "expected a number, or keyframes such as 0:1.0,0.5:0.3 (fraction of the steps: value)"


def number(value, name: str) -> float:
    """Return a finite number. Raises InputError, naming it, for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{name} {value!r}; expected a finite number")
    if abs(found) > LARGEST:
        raise InputError(f"{name} {value!r}; expected a number between -{LARGEST:g} and {LARGEST:g}")
    return found


def read_keyframes(value, name: str) -> float | Keyframes:
    """Return a number, or the keyframes of a text such as "0:1.0,0.5:0.3", a mapping, or a list of pairs.

    Raises InputError, naming it, where a fraction is outside [0, 1] or not after the one before it.
    """
    pairs = _pairs(value)
    if pairs is None:
        return number(value, name)
    if not 1 <= len(pairs) <= MOST:
        raise InputError(f"{name} has {len(pairs)} keyframes; expected 1 to {MOST}")
    try:
        if not all(isinstance(pair, (list, tuple)) for pair in pairs):
            raise TypeError
        frames = tuple((number(at, name), number(amount, name)) for at, amount in pairs)
    except (TypeError, ValueError, InputError) as error:
        raise InputError(f"{name} {value!r}; {EXPECTED}") from error
    places = [at for at, _ in frames]
    if not all(0 <= at <= 1 for at in places) or any(a >= b for a, b in itertools.pairwise(places)):
        raise InputError(
            f"{name} {value!r}; expected fractions of the steps from 0 to 1, each after the one before"
        )
    return frames


def amounts(value: float | Keyframes) -> list[float]:
    """Return the number, or every keyframe's."""
    return [value] if isinstance(value, float) else [amount for _, amount in value]


def left_from(frames: Keyframes, start: float) -> bool:
    """Return whether any value from a fraction of the steps on is other than 0."""
    return _at(frames, start) != 0 or any(amount != 0 for at, amount in frames if at > start)


def over_steps(value: float | Keyframes, steps: int) -> list[float]:
    """Return the number at each of `steps` steps. Step i of n is at i / n, as a region's start and end count."""
    return [value if isinstance(value, float) else _at(value, i / steps) for i in range(steps)]


def written(value: float | Keyframes) -> str:
    """Return it as it can be given."""
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(f"{at:g}:{amount:g}" for at, amount in value)


def _pairs(value) -> list | None:
    """Return what may be keyframes; None for what is to be a number."""
    if isinstance(value, str) and ":" in value:
        return [part.split(":") for part in value.split(",")]
    if isinstance(value, Mapping):
        return list(value.items())
    return list(value) if isinstance(value, (list, tuple)) else None


def _at(frames: Keyframes, place: float) -> float:
    """Return the value at a fraction of the steps: before the first keyframe its own, after the last the last's."""
    if place <= frames[0][0]:
        return frames[0][1]
    for (before, left), (after, right) in itertools.pairwise(frames):
        if place < after:
            return left + (right - left) * (place - before) / (after - before)
    return frames[-1][1]
