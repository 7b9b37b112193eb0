"""python -m benchmarks.graphs [--small] [--out FOLDER]

The graph that TensorRT gets: SDXL's UNet with control as this project exports it, and diffusers' own UNet exported the
plain way (torch.onnx.export on the module, same opset, random weights, fp16). Nodes, attention and normalisations in
the form that TensorRT fuses, casts; and what the parser of TensorRT for RTX makes of each. Writes <out>/graphs.csv.
Needs 13 GB of memory and 12 GB of disk; --small tries a small UNet instead.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import tensorrt_rtx
import torch
from diffusers import UNet2DConditionModel

from benchmarks.full_size import SMALL, build
from benchmarks.measure import RESULTS, check_out, environment, write_rows
from export.graph_report import report
from export.graphs import make_components
from export.onnx_export import OPSET, export_onnx, silence
from export.targets import tensorrt as compile_tensorrt
from runtime.cli.command import Parser, exit_code
from runtime.engines.ports import Profile
from runtime.errors import InputError
from runtime.loading.single_file import SDXL_CONFIGS
from runtime.model.unet import UNet

PIXELS = 1024
TOKENS = 77


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.graphs", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument(
        "--work", type=Path, default=Path("out"), help="where the graphs are made, then removed"
    )
    parser.add_argument("--small", action="store_true", help="a small UNet: tries this script")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Export, report, write."""
    for folder in (options.out, options.work):
        check_out(folder)
    config = json.loads((SDXL_CONFIGS / "unet" / "config.json").read_text()) | (
        SMALL if options.small else {}
    )
    with torch.no_grad():
        unet = build(config).half()
    exports: dict[str, Callable[[Path], None]] = {
        "diffusers, plain torch.onnx.export": lambda path: export_diffusers(unet, path),
        "localcontrol": lambda path: export_ours(unet, path),
    }
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(name, export, options.work) for name, export in exports.items()]
    for row in rows:
        print(*(f"{key:>22}  {value}" for key, value in row.items()), sep="\n", end="\n\n")
    write_rows(options.out / ("graphs_small.csv" if options.small else "graphs.csv"), rows)


def measure(name: str, export: Callable[[Path], None], work: Path) -> dict:
    """Return one row: what the exported file is like, and TensorRT's network of it."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / "unet.onnx"
        export(path)
        counts = asdict(report(path))
        network = parse(path)
    here = environment()
    versions = {
        "torch": here["torch"],
        "diffusers": here["diffusers"],
        "tensorrt_rtx": tensorrt_rtx.__version__,
    }
    return {"graph": name, "opset": OPSET, **counts, **network, **versions, "commit": here["commit"]}


def parse(path: Path) -> dict:
    """TensorRT's layers, and those of them that normalise or cast; or its reason to refuse the file."""
    builder, logger = compile_tensorrt.start(tensorrt_rtx)
    kinds = tensorrt_rtx.LayerType
    columns = {
        "tensorrt_layers": "",
        "tensorrt_normalizations": "",
        "tensorrt_casts": "",
        "tensorrt_refuses": "",
    }
    try:
        network, parser = compile_tensorrt.parse(tensorrt_rtx, builder, logger, path)
    except InputError as error:
        return {**columns, "tensorrt_refuses": str(error).partition("refuses it: ")[2][:200]}
    types = [network.get_layer(i).type for i in range(network.num_layers)]
    del parser
    return {
        **columns,
        "tensorrt_layers": len(types),
        "tensorrt_normalizations": types.count(kinds.NORMALIZATION),
        "tensorrt_casts": types.count(kinds.CAST),
    }


def export_ours(unet: UNet2DConditionModel, path: Path) -> None:
    """Export as `export.build_engine` does, with the four levels of control as inputs."""
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1,) * 4))
    tokenizer = SimpleNamespace(model_max_length=TOKENS)
    model = SimpleNamespace(unet=UNet.from_diffusers(unet), vae=vae, tokenizers=[tokenizer])
    size = (512, PIXELS, PIXELS)
    export_onnx(next(make_components(model, {}, ["unet"])), Profile((1, 1, 1), size, size), path)


@torch.no_grad()
def export_diffusers(unet: UNet2DConditionModel, path: Path) -> None:
    """Export the module as it is, without control, which diffusers has no input for in its exports; the same dynamic
    sizes.
    """
    config, dtype, side = unet.config, unet.dtype, PIXELS // 8
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(2, pooled, dtype=dtype), "time_ids": torch.zeros(2, 6)}
    inputs = {
        "sample": torch.zeros(2, config.in_channels, side, side, dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.zeros(2, TOKENS, config.cross_attention_dim, dtype=dtype),
        "added_cond_kwargs": added,
    }
    free = torch.export.Dim.DYNAMIC
    shapes = {
        "sample": {0: free, 2: free, 3: free},
        "timestep": None,
        "encoder_hidden_states": {0: free},
        "added_cond_kwargs": {"text_embeds": {0: free}, "time_ids": {0: free}},
    }
    with silence():
        program = torch.onnx.export(
            unet.eval(),
            (),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            verbose=False,
        )
    program.save(path, external_data=True)


if __name__ == "__main__":
    sys.exit(main())
