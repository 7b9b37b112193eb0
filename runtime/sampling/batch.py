"""Runs that share the denoiser's calls: a tick is a step of each, whatever step each of them is at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from runtime.sampling.denoiser import Denoiser
from runtime.sampling.loop import Run
from runtime.sampling.torch_step import Part


class Batch:
    """Calls of a denoiser that runs share, which join and leave between them."""

    def __init__(self, denoiser: Denoiser):
        self._joint = denoiser.joint()

    def tick(self, runs: Sequence[Run]) -> dict[Run, Exception]:
        """Take the next step of every run, none of which is done; those of latents of one size in one call.

        A picture does not depend on the runs beside it, beyond rounding. Returns what went wrong with single runs, such
        as `Cancelled`, or an error of their on_step; these are not to be gone on with.
        """
        failed: dict[Run, Exception] = {}
        sizes: dict[tuple[int, ...], list[Run]] = {}
        for run in runs:
            sizes.setdefault(tuple(run.latents.shape[1:]), []).append(run)
        for alike in sizes.values():
            parts = {}
            for run in alike:
                with noted(failed, run):
                    parts[run] = Part(run.step, run.sample(), run.index)
            outputs = self._joint(list(parts.values())) if parts else []
            for run, output in zip(parts, outputs, strict=True):
                with noted(failed, run):
                    run.advance(output)
        return failed


@contextmanager
def noted(failed: dict[Run, Exception], run: Run) -> Iterator[None]:
    """Keep what goes wrong in the block as that run's."""
    try:
        yield
    except Exception as error:
        failed[run] = error
