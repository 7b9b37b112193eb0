"""python -m export.verify FOLDER [--tolerance X] [--json FILE]

Runs every graph of an engine folder in torch, in ONNX Runtime and in its engine on the same inputs, at the smallest,
usual and largest sizes it was built for, and prints how far the outputs are apart. Exit code 1 beyond the tolerance.
The outcome is noted in the folder: what opens it on this kind of machine goes by that.
"""

from __future__ import annotations

# isort: off
import runtime.cli.interrupt  # noqa: F401 -- before the seconds that the other imports take
# isort: on

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path

import torch
from torch import Tensor, nn

from export.verify_cases import cases_of
from runtime.cli.command import Parser, exit_code, say
from runtime.engines import verified
from runtime.engines.base import check_contents, check_folder
from runtime.engines.manifest import ADAPTER, EngineSpec, Manifest, check_files, read_manifest
from runtime.engines.parts import engine_device
from runtime.engines.ports import most_words
from runtime.errors import InputError
from runtime.machine.arithmetic import DTYPES, is_quick
from runtime.machine.files import check_writable, expand, write_json

# Largest relative RMS error: float32 in another order; half precision, whose rounding adds up over hundreds of layers.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
Run = Callable[[Mapping[str, Tensor], Mapping[str, int]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """One output of one graph at one size. max and rms: of the difference from torch, over torch's RMS."""

    graph: str
    sizes: str
    inputs: str
    against: str
    output: str
    max: float
    rms: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.rms <= self.limit  # false for NaN


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 where an output is too far from torch's, or 2 for bad input (one line on stderr)."""
    parser = Parser(prog="python -m export.verify", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    parser.add_argument("folder", help="what export.build_engine wrote")
    parser.add_argument("--model", help="where the model is now, if it was moved")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="as for the build, if it was moved")
    parser.add_argument("--config", metavar="FOLDER", help="likewise")
    parser.add_argument("--tolerance", type=float, help="of the relative RMS error (default: by precision)")
    parser.add_argument("--graphs", nargs="+", default=[], metavar="NAME", help="only these, such as unet")
    parser.add_argument("--smallest", action="store_true", help="only the smallest size")
    parser.add_argument("--allow-pickle", action="store_true", help="as in runtime.generate")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return exit_code(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    """Print every row as it is found, note the outcome; return 1 where an output is too far from torch's."""
    if options.json:
        check_writable(options.json, "--json")
    found = verify(
        options.folder,
        options.model,
        tolerance=options.tolerance,
        only=options.graphs,
        smallest=options.smallest,
        say=say,
        allow_pickle=options.allow_pickle,
        tokenizer=options.tokenizer,
        config=options.config,
    )
    rows = []
    for row in found:
        rows.append(row)
        print(format_row(row), flush=True)
    if options.json:
        write_json({"rows": [asdict(row) for row in rows]}, options.json, "--json")
    if options.tolerance is None:
        _note_if_writable(options.folder, rows, not options.graphs, options.smallest)
    failed = [row for row in rows if not row.passed]
    print(f"{len(rows) - len(failed)} of {len(rows)} within tolerance")
    return int(bool(failed) or not rows)


def device_of(folder: Path) -> torch.device:
    """Return where the folder's engines run; the CPU where that is a GPU and there is none."""
    kind = engine_device(folder)
    return torch.device(kind if torch.cuda.is_available() else "cpu")


def note_rows(folder: str | Path, rows: Sequence[Row], whole: bool, smallest: bool = False) -> None:
    """Note in the folder what its own engines computed on this machine (see `runtime.engines.verified`).

    whole: whether every graph was compared; otherwise only a failure is worth noting. smallest: at the smallest size
    alone, which takes no failure back: that may be one of a larger size. Raises InputError where the folder cannot be
    written.
    """
    folder = expand(folder)
    manifest = read_manifest(folder)
    own = [row for row in rows if row.against == manifest.target]
    if not own or (not whole and all(row.passed for row in own)):
        return
    worst = max(own, key=lambda row: float("inf") if isnan(row.rms) else row.rms / row.limit)
    text = f"{worst.graph} {worst.output}: relative RMS {worst.rms:.1e}, at most {worst.limit:.0e} at {worst.sizes}"
    passed, device = all(row.passed for row in own), device_of(folder)
    known = verified.noted(manifest, folder, device) if passed and smallest else None
    if known is not None and known.get("passed") is not True:
        return
    verified.note(manifest, folder, device, {"worst": text}, passed)


def _note_if_writable(folder: str, rows: Sequence[Row], whole: bool, smallest: bool) -> None:
    try:
        note_rows(folder, rows, whole, smallest)
    except InputError as error:
        say(f"not noted: {error}")


def format_row(row: Row) -> str:
    mark = "ok  " if row.passed else "FAIL"
    what = f"{row.graph:18} {row.output:12} {row.against:13} {row.sizes:32} {row.inputs:24}"
    return f"{mark} {what} rms {row.rms:.1e} max {row.max:.1e} (limit {row.limit:.0e})"


def verify(
    folder: str | Path,
    source: str | None = None,
    *,
    tolerance: float | None = None,
    only: Sequence[str] = (),
    smallest: bool = False,
    engines_only: bool = False,
    say: Callable[[str], None] = print,
    **options,
) -> Iterator[Row]:
    """Yield a row for each output, size, input and runtime; see `main`.

    source: where the model is, by default where it was compiled from. only: some of the graphs. smallest: only at the
    smallest size. engines_only: without the ONNX files. options: of `loading.load_model`. Raises InputError where the
    folder is not whole, the model has other weights, or nothing can be compared here.
    """
    folder = expand(folder)
    manifest = read_manifest(folder)
    device = device_of(folder)
    check_contents(manifest, folder)
    try:
        check_folder(manifest, folder, device)
        runs_here = True
    except InputError as error:
        say(f"only the ONNX files are compared: {error}")
        runs_here = False
    for name in only:
        if name not in manifest.engines:
            raise InputError(f"--graphs {name}: expected some of {', '.join(manifest.engines)}")
    graphs = {name: spec for name, spec in manifest.engines.items() if not only or name in only}
    modules = _modules(manifest, graphs, source, device, **options)
    for name, spec in graphs.items():
        runs = dict(_runs(manifest, folder, name, device, runs_here, engines_only))
        if not runs:
            raise InputError(f"{name}: nothing to compare here: neither its engine nor its ONNX file can run")
        limit = TOLERANCES[spec.dtype] if tolerance is None else tolerance
        for sizes, label, inputs in cases_of(manifest.profile, spec, name, modules[name], smallest):
            truth = _run_torch(modules[name], spec, inputs, device)
            for against, run in runs.items():
                outputs = run(inputs, sizes)
                for port in spec.outputs:
                    error = outputs[port.name].cpu().double() - truth[port.name].cpu().double()
                    scale = truth[port.name].double().square().mean().sqrt().clamp_min(1e-12).item()
                    text = " ".join(f"{axis} {size}" for axis, size in sizes.items())
                    worst, rms = error.abs().max().item() / scale, error.square().mean().sqrt().item() / scale
                    yield Row(name, text, label, against, port.name, worst, rms, limit)


def _modules(
    manifest: Manifest, graphs: Mapping[str, EngineSpec], source: str | None, device: torch.device, **options
) -> dict[str, nn.Module]:
    """Return the torch module of every graph, found to have the weights that were compiled.

    On a CPU that is slow in the engines' precision it computes in float32, which is no further from the truth.
    """
    from export.graphs import make_components
    from runtime.engines.parts import load_source
    from runtime.loading.adapter import embedded_adapters, load_adapter
    from runtime.loading.weights import weights_digest

    model, dtype = load_source(manifest, device, source, **options), DTYPES[manifest.precision]
    sources = {name.removeprefix(ADAPTER) for name in graphs if name.startswith(ADAPTER)}
    how = {"device": device, "dtype": dtype, "allow_pickle": options.get("allow_pickle", False)}
    found = {name: manifest.adapters.get(name) or embedded_adapters()[name] for name in sources}
    adapters = {name: load_adapter(path, name=name, **how) for name, path in found.items()}
    names = dict.fromkeys("adapter" if name.startswith(ADAPTER) else name for name in graphs)
    words = most_words(graphs["unet"].inputs) if "unet" in graphs else 0
    made = make_components(model, adapters, list(names), words)
    modules = {component.name: component.module for component in made}
    for name, spec in graphs.items():
        if weights_digest(modules[name]) != spec.weights:
            raise InputError(f"{name}: its weights are not those that were compiled; {manifest.rebuild}")
    return modules if is_quick(dtype, device) else {name: module.float() for name, module in modules.items()}


def _runs(
    manifest: Manifest, folder: Path, name: str, device: torch.device, runs_here: bool, engines_only: bool
) -> Iterator[tuple[str, Run]]:
    """Yield what there is to compare with torch: the ONNX file in ONNX Runtime, and the engine where it can run."""
    from runtime.engines.base import open_engine, package_version

    spec = manifest.engines[name]
    kept = spec.onnx is not None and not engines_only
    if kept and spec.dtype != torch.bfloat16 and manifest.target != "onnxruntime":
        package_version("onnxruntime")
        from runtime.engines import onnxruntime as engine_onnxruntime

        check_files(manifest, folder, [file for file in manifest.files if file.startswith(spec.onnx)])
        path, cpu = folder / spec.onnx, torch.device("cpu")
        yield "onnxruntime", _caller(engine_onnxruntime.open_engine(manifest, spec, path, cpu, {}))
    if runs_here:
        yield manifest.target, _caller(open_engine(manifest, folder, name, device))


def _caller(engine) -> Run:
    return lambda inputs, sizes: engine(inputs, **sizes)


@torch.inference_mode()
def _run_torch(
    module: nn.Module, spec: EngineSpec, inputs: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    given = [inputs[port.name].to(device) for port in spec.inputs]
    if next(module.parameters()).dtype == torch.float32:
        given = [tensor.float() if tensor.is_floating_point() else tensor for tensor in given]
    outputs = module(*given)
    return {port.name: tensor for port, tensor in zip(spec.outputs, outputs, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
