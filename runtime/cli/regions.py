"""The regions that a command line describes: of its options, of --region, and of a --regions file."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.cli.sources import adapter_sources
from runtime.errors import InputError
from runtime.machine.files import unique

REGION_KEYS = (
    "condition, mask, adapter, scale, start, end, levels (a:b:c:d), mask_condition, preprocess, prompt, "
    "prompt_weight, uncond_scale"
)


def region_fields(options: argparse.Namespace) -> list[tuple[str, dict[str, Any], Path | None]]:
    """Return every region that was asked for: its name in messages, its fields, and the folder its paths start from."""
    adapter = options.control or next(iter(adapter_sources(options.adapter)), None)
    default = {} if adapter is None else {"adapter": adapter}
    names = (
        "condition",
        "preprocess",
        "mask",
        "scale",
        "start",
        "end",
        "levels",
        "mask_condition",
        "uncond_scale",
    )
    single = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    found: list[tuple[str, dict, Path | None]] = []
    if single or options.region_prompt is not None:
        if "condition" not in single and options.region_prompt is None:
            given = ", ".join("--" + name.replace("_", "-") for name in single)
            raise InputError(
                f"{given} without --condition; expected the picture that the control shows, or --region-prompt"
            )
        if options.region_prompt is not None:
            single["prompt"] = options.region_prompt
        found.append(("region", single, None))
    found += [(f"--region {i + 1}", parse_region(text), None) for i, text in enumerate(options.region)]
    if options.regions:
        folder = Path(os.path.expanduser(options.regions)).parent
        for i, fields in enumerate(read_regions(options.regions)):
            found.append((f"{options.regions} region {i + 1}", fields, folder))
    controlled = [
        isinstance(fields, Mapping) and fields.get("condition") is not None for _, fields, _ in found
    ]
    if options.control is not None and not any(controlled):
        raise InputError(
            f"--control {options.control} without a condition; expected the picture that it reads"
        )
    return [
        (name, {**default, **fields} if has_control else fields, folder)
        for (name, fields, folder), has_control in zip(found, controlled, strict=True)
    ]


def parse_region(text: str) -> dict[str, str]:
    """ "condition=a.png,scale=0.5" -> its keys and values; a comma inside a path is part of it."""
    fields: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals:
            raise InputError(
                f"--region {text!r}: {part.strip()!r} has no value; expected key=value, of {REGION_KEYS}"
            )
        if key in fields:
            raise InputError(f"--region {text!r}: {key} is given twice; expected it once")
        if not value.strip() and key != "prompt":
            raise InputError(f"--region {text!r}: {key} is empty; expected a value, or no such key")
        fields[key] = value.strip()
    return fields


def read_regions(path: str) -> list:
    """Return the list of a --regions file."""
    try:
        data = json.loads(Path(os.path.expanduser(path)).read_text("utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise InputError(f"regions: cannot read {path}: {error.strerror}; expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise InputError(f"regions: {path} is not JSON: {error}") from error
    if not isinstance(data, list) or not data:
        raise InputError(f'regions: {path} is not a list of regions; expected [{{"condition": ...}}, ...]')
    return data
