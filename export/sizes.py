"""The command line's sizes as an engine's profile."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.control.levels import picture_side
from runtime.engines.ports import Profile, Range
from runtime.errors import InputError

MOST_IMAGES = 1024  # of a call


def make_profile(values: Mapping[str, str | None], guidance: str, default: int) -> Profile:
    """Return a profile from "1024" or "512:1024:1536" for each of batch, height and width; None is `default` pixels.

    Raises InputError, naming the option, where one is not such a range of multiples of 16.
    """
    ranges = {}
    for name in ("height", "width"):
        ranges[name] = parse_range(f"--{name}", values[name] or str(default))
        for size in ranges[name]:
            picture_side(size, name)
    batch = parse_range("--batch", values["batch"])
    if batch[2] > MOST_IMAGES:
        raise InputError(f"--batch {values['batch']}: expected at most {MOST_IMAGES} images")
    return Profile(batch, **ranges, guidance=guidance)


def parse_range(option: str, value: str) -> Range:
    """ "4" -> (4, 4, 4); "1:2:4" -> (1, 2, 4)."""
    try:
        sizes = tuple(int(part) for part in value.split(":"))
    except ValueError:
        sizes = ()
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) != 3 or sizes[0] < 1 or list(sizes) != sorted(sizes):
        raise InputError(
            f"{option} {value}: expected a whole number, or smallest:usual:largest such as 512:1024:1536"
        )
    return sizes
