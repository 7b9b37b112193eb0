"""Engines for OpenVINO: its own files, found to compile on this machine's CPU."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import openvino as ov
import torch

from export.compile import Compiled
from runtime.engine_openvino import settings, the_core
from runtime.errors import InputError
from runtime.files import replacing
from runtime.weights import first_line

ANGLES = ("Sin", "Cos")
CONSTANT = ("Parameter", "Const")
NOT_COMPUTED = ("Input", "Output", "Const", "Constant", "Reorder")


def build(source: Path, path: Path, dtype: torch.dtype) -> Compiled:
    """Write `path` (.xml) and its .bin, and count the precisions its layers run in here.

    source: the ONNX file. dtype: of its arithmetic. Raises InputError where OpenVINO refuses it.
    """
    core = the_core()
    try:
        ov.save_model(core.read_model(source), path, compress_to_fp16=False)
        keep_precise(path)
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


def keep_precise(path: Path) -> None:
    """Mark what leads to a sine or cosine to be computed in float32 whatever the precision asked for.

    OpenVINO computes all of a model in it otherwise, and the sine of a timestep or a size in pixels, up to 1000 rad and
    more, is lost in bfloat16: 9 % of the prediction of the embedded model at timestep 999.
    """
    tree = ElementTree.parse(path)
    layers = {layer.get("id"): layer for layer in tree.getroot().find("layers")}
    inputs: dict[str, list[str]] = {}
    for edge in tree.getroot().find("edges"):
        inputs.setdefault(edge.get("to-layer"), []).append(edge.get("from-layer"))
    waiting = [name for name, layer in layers.items() if layer.get("type") in ANGLES]
    marked: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in marked and layers[name].get("type") not in CONSTANT:
            marked.add(name)
            waiting += inputs.get(name, [])
            _mark(layers[name])
    with replacing(path) as partial:
        tree.write(partial, encoding="utf-8", xml_declaration=True)


def _mark(layer: ElementTree.Element) -> None:
    """The runtime attribute by which OpenVINO leaves a layer's precision alone."""
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        layer.insert(int(layer.find("data") is not None), info)  # before the ports, as OpenVINO writes it
    ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
