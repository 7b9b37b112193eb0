"""Engines for OpenVINO: its own files, found to compile on this machine's CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import openvino as ov
import torch

from export.targets.openvino_norms import rewrite_norms
from export.targets.options import Compiled
from runtime.engines.openvino import settings, the_core
from runtime.errors import InputError, first_line

NOT_COMPUTED = ("Input", "Output", "Const", "Constant", "Reorder")


def build(source: Path, path: Path, dtype: torch.dtype) -> Compiled:
    """Write `path` (.xml) and its .bin, and count the precisions its layers run in here.

    source: the ONNX file. dtype: of its arithmetic. Raises InputError where OpenVINO refuses it.
    """
    core = the_core()
    try:
        model = core.read_model(source)
        rewrite_norms(model)
        ov.save_model(model, path, compress_to_fp16=False)
        compiled = core.compile_model(path, "CPU", settings(core, dtype))
    except RuntimeError as error:
        raise InputError(f"{source.name}: OpenVINO refuses it: {first_line(error)}") from error
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    layers = Counter(
        info["runtimePrecision"].astype(str)
        for info in nodes
        if info["layerType"].astype(str) not in NOT_COMPUTED
    )
    return Compiled((path, path.with_suffix(".bin")), dict(layers.most_common()))
