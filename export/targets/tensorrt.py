"""Engines for TensorRT (10.x, 11.x) and TensorRT for RTX: strongly typed, so precision is the ONNX file's."""

from __future__ import annotations

import importlib
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from export.targets.options import Compiled, CompileOptions, Progress
from runtime.engines.ports import Port, Profile
from runtime.engines.targets import TARGETS
from runtime.engines.tensorrt import is_rtx
from runtime.errors import InputError
from runtime.machine.files import expand, replacing

DEFAULT = ("8.6", "8.9", "12.0")  # of TensorRT for RTX, on a machine without a GPU: RTX 30, 40 and 50


def check_capabilities(target: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return the compute capabilities to build for: the ones asked for, or this machine's GPU's.

    Raises InputError where the target cannot build for one of them, or not on this machine.
    """
    trt = importlib.import_module(TARGETS[target].package)
    here = ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None
    if not is_rtx(trt):
        if here is None:
            raise InputError(
                "--target tensorrt: it builds on the GPU it builds for, and there is none; try tensorrt-rtx"
            )
        if any(capability != here for capability in wanted):
            raise InputError(
                f"--compute-capability {' '.join(wanted)}: TensorRT builds for this machine's GPU only, {here}"
            )
        return (here,)
    known = supported(trt)
    chosen = wanted or ((here,) if here else tuple(c for c in DEFAULT if c in known))
    for capability in chosen:
        if capability not in known:
            raise InputError(
                f"target tensorrt-rtx does not support compute capability {capability}; it supports {', '.join(known)}"
                " (for data centre GPUs take --target tensorrt)"
            )
    return chosen


def check_refit(target: str, refit: bool) -> None:
    """Raise InputError where a refittable engine cannot be built here: TensorRT for RTX 1.7 fails without a GPU."""
    if refit and target == "tensorrt-rtx" and not torch.cuda.is_available():
        raise InputError(
            "--refit: TensorRT for RTX needs a GPU to build engines whose weights can be exchanged"
        )


def supported(trt) -> dict[str, object]:
    """Compute capability, such as "8.9" -> TensorRT for RTX's own name of it."""
    members = {
        name: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")
    }
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items()}


def build(
    source: Path,
    path: Path,
    inputs: tuple[Port, ...],
    profile: Profile,
    options: CompileOptions,
    progress: Progress | None,
) -> Compiled:
    """Parse, build, write. Raises InputError with TensorRT's own words where it refuses the graph."""
    trt = importlib.import_module(TARGETS[options.target].package)
    check_refit(options.target, options.refit)
    builder, logger = start(trt)
    network, parser = parse(trt, builder, logger, source)  # the parser owns the weights
    config = _config(trt, builder, inputs, profile, options)
    config.progress_monitor = monitor = _monitor(trt, progress)
    with _TimingCache(trt, config, options.timing_cache), _interrupts(monitor):
        data = builder.build_serialized_network(network, config)
    if monitor.cancelled is not None:
        raise monitor.cancelled
    if data is None:
        raise InputError(f"{source.name}: {options.target} cannot build it: {logger.last}")
    path.write_bytes(data)
    layers = layer_precisions(network)
    del parser
    return Compiled((path,), layers)


def start(trt) -> tuple:
    """Return a builder, and the logger that keeps its last error."""
    logger = _Logger(trt)
    return trt.Builder(logger.own), logger


def parse(trt, builder, logger, source: Path):
    """Return the ONNX file as TensorRT's network, and the parser, to be kept as long as it."""
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, logger.own)
    if not parser.parse_from_file(os.fspath(source)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reason = f"node {errors[0].node_name()}: {errors[0].desc()}" if errors else logger.last
        raise InputError(f"{source.name}: the ONNX parser refuses it: {reason}")
    return network, parser


def layer_precisions(network) -> dict[str, int]:
    """Return how many layers give each type."""
    counts = Counter()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        counts.update(
            str(layer.get_output(k).dtype).rpartition(".")[2] for k in range(min(layer.num_outputs, 1))
        )
    return dict(counts.most_common())


def _config(trt, builder, inputs: tuple[Port, ...], profile: Profile, options: CompileOptions):
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    shapes = builder.create_optimization_profile()
    for port in inputs:
        if port.shape:
            shapes.set_shape(port.name, *profile.shapes(port))
    config.add_optimization_profile(shapes)
    if is_rtx(trt):
        config.num_compute_capabilities = len(options.capabilities)
        for i, capability in enumerate(options.capabilities):
            config.set_compute_capability(supported(trt)[capability], i)
    return config


def timing_cache_path(trt) -> Path:
    """Return where this TensorRT's measurements on this GPU are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or expand("~/.cache", "XDG_CACHE_HOME"))
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return cache / "localcontrol" / "timing" / f"{name}-tensorrt-{trt.__version__}.cache"


@contextmanager
def _interrupts(monitor) -> Iterator[None]:
    """Ctrl-C is noted and stops the build at its next step: raised in a callback, TensorRT's C++ would swallow it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: setattr(monitor, "cancelled", KeyboardInterrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _TimingCache:
    """TensorRT's measurements, read before a build and kept after it; TensorRT for RTX measures nothing."""

    def __init__(self, trt, config, path: Path | None):
        self.config, self.path = config, None if is_rtx(trt) else path or timing_cache_path(trt)

    def __enter__(self) -> None:
        if self.path is not None:
            known = self.path.read_bytes() if self.path.is_file() else b""
            self.cache = self.config.create_timing_cache(known)
            if not self.config.set_timing_cache(
                self.cache, ignore_mismatch=False
            ):  # of another GPU or version
                self.cache = self.config.create_timing_cache(b"")
                self.config.set_timing_cache(self.cache, ignore_mismatch=False)

    def __exit__(self, *_) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_bytes(self.cache.serialize())


class _Logger:
    """TensorRT's messages: the last error is kept for our own line."""

    def __init__(self, trt):
        outer, self.last = self, "no message"

        class Logger(trt.ILogger):
            def log(self, severity, message: str) -> None:
                # without a GPU it cannot tell its properties, and says so: a build for another GPU does not need them
                if severity <= trt.ILogger.Severity.ERROR and "CUDA driver" not in message:
                    outer.last = " ".join(message.split())

        self.own = Logger()


def _monitor(trt, progress: Progress | None):
    """TensorRT's progress, its outermost phases only; stops the build where `progress` raises."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            super().__init__()
            self.steps: dict[str, int] = {}
            self.cancelled: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None or parent_phase == OUTERMOST:
                self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                self._report(phase_name, self.steps[phase_name])

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                self._report(phase_name, step)
            return self.cancelled is None

        def _report(self, phase: str, step: int) -> None:
            try:
                if progress is not None:
                    progress(phase, step, self.steps[phase])
            except BaseException as error:  # it would be lost in TensorRT's C++
                self.cancelled = error

    return Monitor()


OUTERMOST = "Building engine"
