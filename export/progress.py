"""Progress bars of a build's stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """A bar for one stage, and what to call with ([what is being done,] done, of how many)."""
    with tqdm(total=None, desc=f"{what:24}", unit=unit, dynamic_ncols=True, mininterval=0.5) as shown:

        def progress(*report) -> None:
            *phase, done, total = report
            if phase:
                shown.set_postfix_str(phase[0], refresh=False)
            if shown.total != total or done < shown.n:  # another phase counts anew
                shown.reset(total)
            shown.update(done - shown.n)

        yield progress
