"""What a client is told that it can ask for."""

from __future__ import annotations

from typing import Any

from runtime.cli.presets import PRESETS
from runtime.control.image_files import formats
from runtime.control.levels import SIZE_MULTIPLE
from runtime.sampling.schedulers import SCHEDULERS
from runtime.serve.identity import Served
from runtime.serve.limits import Limits
from runtime.serve.orders import Orders


def capabilities_of(served: Served, orders: Orders, limits: Limits) -> dict[str, Any]:
    """Return what can be asked for: sizes, adapters, schedulers, presets, limits."""
    can = served.capabilities
    sizes = {"default": can.side, "multiple": SIZE_MULTIPLE, "most": limits.side}
    if can.profile is not None:
        for side in ("height", "width"):
            sizes[side] = [can.profile.range(side)[0], min(can.profile.range(side)[2], limits.side)]
    return {
        "model": served.name,
        "hash": served.hash,
        "device": served.device,
        "adapters": list(can.adapters),
        "controlnets": list(served.controlnets),
        "default_adapter": orders.default_adapter,
        "preprocessors": orders.preprocessors,
        "schedulers": list(SCHEDULERS),
        "presets": PRESETS,
        "sizes": sizes,
        "formats": formats(),
        "words": can.words,
        "cache": can.whole_steps is None,
        "rows": served.rows,
        "limits": {name: getattr(limits, name) for name in vars(limits)},
    }
