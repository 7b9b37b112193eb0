"""Arguments as they are given: numbers of Python, numpy or PyTorch are taken as what they are, all else is refused."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from torch import Tensor

from runtime.errors import InputError


def whole_number(value: Any, name: str, least: int = 1, most: int | None = None) -> int:
    """Return a whole number as an int. Raises InputError, naming `name`, for another type or outside [least, most]."""
    try:
        number = None if _is_truth(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} {_shown(value)}: expected a whole number {limits}")
    return number


def real_number(value: Any, name: str) -> float:
    """Return a finite number as a float. Raises InputError, naming `name`, where it is not one (text is not)."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        value = value.item()
    if not is_finite_number(value):
        raise InputError(f"{name} {value!r}: expected a finite number")
    return float(value)


def is_finite_number(value: Any) -> bool:
    """Return whether it is a real number that a float can hold; text and truth values are not."""
    try:
        return isinstance(value, Real) and not _is_truth(value) and math.isfinite(value)
    except OverflowError:  # of a long int
        return False


def truth(value: Any, name: str) -> bool:
    """Return True or False. Raises InputError for all else: text such as "no" is true to Python."""
    if not _is_truth(value) or getattr(value, "ndim", 0):
        raise InputError(f"{name} {_shown(value)}: expected True or False")
    return bool(value)


def fractions(value: Any, name: str) -> tuple[float, float]:
    """Return the part of the steps between two fractions. Raises InputError unless 0 <= start <= end <= 1."""
    try:
        start, end = value
    except (TypeError, ValueError):
        raise InputError(f"{name} {value!r}: expected two fractions of the steps") from None
    start, end = real_number(start, f"{name} start"), real_number(end, f"{name} end")
    if not 0 <= start <= end <= 1:
        raise InputError(f"{name} {start:g} to {end:g}: expected 0 <= start <= end <= 1")
    return start, end


def _is_truth(value: Any) -> bool:
    """Return whether it is True or False, which are numbers to Python."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
