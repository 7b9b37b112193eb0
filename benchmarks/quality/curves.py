"""How the control answers: to its strength, and to the steps between which it acts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.quality.evaluate import Drawer, evaluate, summary
from benchmarks.quality.samples import Sample

SWEEPS = {  # field of a Region -> its values; the others keep their defaults
    "scale": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "start": (0.0, 0.1, 0.2, 0.4, 0.6, 0.8),
    "end": (0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
}
FIGURES = ("lfmse_inside", "f1", "leakage")


def sweep(drawer: Drawer, samples: Sequence[Sample], condition: str = "canny") -> Iterator[dict]:
    """Yield a row for each field, value and figure: field, value, figure, mean, low, high, n."""
    for field, values in SWEEPS.items():
        for value in values:
            rows = list(evaluate(drawer, samples, condition, **{field: value}))
            for name, estimate in summary(rows).items():
                if name in FIGURES:
                    yield {"field": field, "value": value, "figure": name, **vars(estimate)}
