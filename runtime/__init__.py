"""Text-to-image with SDXL where a control acts only inside a region that the user paints.

    from runtime import LocalControlPipeline, Region

Importing this package is cheap: torch and diffusers are imported by the first of these names that is used.
"""

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.control.region import Region
    from runtime.errors import Cancelled, InputError
    from runtime.pipeline import LocalControlPipeline
    from runtime.sampling.progress import Progress
    from runtime.sampling.result import Result

__all__ = ["Cancelled", "InputError", "LocalControlPipeline", "Progress", "Region", "Result"]

_MODULES = {
    "Cancelled": "runtime.errors",
    "InputError": "runtime.errors",
    "LocalControlPipeline": "runtime.pipeline",
    "Progress": "runtime.sampling.progress",
    "Region": "runtime.control.region",
    "Result": "runtime.sampling.result",
}


def _refuse_other_kernels() -> None:
    """Raise ImportError where `kernels` is, or passes for, Hugging Face's package of that name.

    transformers and diffusers use that package where their `is_kernels_available()` finds it. Ours they leave
    alone: diffusers asks for metadata of a distribution named `kernels`, and ours is named `localcontrol`;
    transformers takes the version of the distribution that provides the import name (in a bare checkout
    `kernels.__version__`) and wants 0.9 or more (lately 0.18), and ours stays below. With a distribution
    named `kernels` installed, both would import from our package what only that one has.
    """
    root = Path(__file__).resolve().parents[1]
    remedy = "run `pip uninstall kernels` and reinstall localcontrol, or give each its own environment"
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise ImportError(
            f"Hugging Face's `kernels` {version} is installed, and localcontrol has a package of that name; "
            f"the two cannot be used together: {remedy}"
        )
    spec = importlib.util.find_spec("kernels")
    origin = Path(spec.origin).resolve() if spec is not None and spec.has_location else None
    if origin != root / "kernels" / "__init__.py":
        raise ImportError(
            f"`import kernels` finds {origin or 'no regular package'}, not localcontrol's own in {root}: "
            f"take the other one off sys.path, or {remedy}"
        )


_refuse_other_kernels()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
