"""What the fields of a region must be: each converted to its type, or refused by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from runtime.control import conditions
from runtime.control.keyframes import Keyframes, amounts, left_from, number, read_keyframes, written
from runtime.control.levels import COUNT
from runtime.errors import InputError


def check(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of a Region, converted to their types; InputError names `name`, the field and the value."""
    fields = dict(fields)
    if fields["condition"] is None and fields["prompt"] is None:
        raise InputError(
            f"{name}: condition is missing, and so is a prompt; expected a picture, words, or both"
        )
    _check_words(fields, name)
    try:
        conditions.check_preprocess_name(fields["preprocess"])
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if not isinstance(fields["adapter"], str) or not fields["adapter"]:
        raise InputError(f"{name}: adapter {fields['adapter']!r}; expected the name of an adapter")
    fields["scale"] = read_keyframes(fields["scale"], f"{name}: scale")
    fields["uncond_scale"] = number(fields["uncond_scale"], f"{name}: uncond_scale")
    fields["start"], fields["end"] = _period(fields["start"], fields["end"], name)
    fields["levels"] = _levels(fields["levels"], name)
    fields["mask_condition"] = _boolean(fields["mask_condition"], f"{name}: mask_condition")
    return fields


def _period(start, end, name: str) -> tuple[float, float | Keyframes]:
    """Return start and end, which may be keyframes of the share of its strength that is left."""
    start, end = number(start, f"{name}: start"), read_keyframes(end, f"{name}: end")
    expected = "expected 0 <= start <= end <= 1"
    for field, value in (("start", start), ("end", end)):
        if not all(0 <= amount <= 1 for amount in amounts(value)):
            raise InputError(f"{name}: {field} {written(value)} is outside [0, 1]; {expected}")
    if isinstance(end, float) and start > end:
        raise InputError(f"{name}: start {start:g} is after end {end:g}; {expected}")
    if not isinstance(end, float) and not left_from(end, start):
        raise InputError(
            f"{name}: end {written(end)} leaves nothing from start {start:g} on; expected more than 0"
        )
    return start, end


def _check_words(fields: dict[str, Any], name: str) -> None:
    prompt, weight = fields["prompt"], read_keyframes(fields["prompt_weight"], f"{name}: prompt_weight")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise InputError(f"{name}: prompt {prompt!r}; expected words")
    if not all(0 <= amount <= 1 for amount in amounts(weight)):
        raise InputError(f"{name}: prompt_weight {written(weight)}; expected a number from 0 to 1")
    if weight != 1 and prompt is None:
        raise InputError(f"{name}: prompt_weight {written(weight)} without a prompt; expected words")
    if fields["condition"] is None:
        _check_words_alone(fields, name)
    fields["prompt_weight"] = weight


def _check_words_alone(fields: dict[str, Any], name: str) -> None:
    """Raise InputError for what says something about a control that is not there."""
    hidden = _boolean(fields["mask_condition"], f"{name}: mask_condition")
    asked = {
        "preprocess": fields["preprocess"] != "none",
        "mask_condition": hidden,
        "scale": read_keyframes(fields["scale"], f"{name}: scale") != 1,
        "uncond_scale": number(fields["uncond_scale"], f"{name}: uncond_scale") != 1,
        "levels": _levels(fields["levels"], name) != (1.0,) * COUNT,
    }
    for field in (field for field, given in asked.items() if given):
        remedy = "; prompt_weight is the strength of words" if field in ("scale", "levels") else ""
        raise InputError(f"{name}: {field} {fields[field]!r} without a condition; expected a picture{remedy}")


def _levels(value, name: str) -> tuple[float, ...]:
    parts = re.split(r"[,:;/\s]+", value.strip()) if isinstance(value, str) else value
    try:
        parts = list(parts)
    except TypeError:
        parts = []
    if len(parts) != COUNT:
        raise InputError(f"{name}: levels {value!r}; expected {COUNT} finite numbers, one for each level")
    return tuple(number(part, f"{name}: levels {value!r} has") for part in parts)


def _boolean(value, name: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise InputError(f"{name} {value!r}; expected true or false")
    return words[str(value).lower()]
