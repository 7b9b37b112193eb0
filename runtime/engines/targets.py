"""The libraries that compile and run engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What compiles and runs engines. package: the module it is imported as; extra: of pip that installs it.

    portable: whether its files run on other hardware and later versions; if not, both must be those of the build.
    """

    package: str
    extra: str
    portable: bool
    gpu: bool


TARGETS = {
    "tensorrt": Target("tensorrt", "tensorrt", portable=False, gpu=True),
    "tensorrt-rtx": Target("tensorrt_rtx", "tensorrt-rtx", portable=False, gpu=True),
    "onnxruntime": Target("onnxruntime", "export", portable=True, gpu=False),
    "openvino": Target("openvino", "openvino", portable=True, gpu=False),
}
