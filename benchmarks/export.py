"""python -m benchmarks.export [--small] [--out FOLDER]

A whole SDXL (2.57 B parameter UNet, its VAE, text encoders and an adapter, random weights in fp16) compiled by TensorRT
for RTX on this machine, which needs no GPU for it: seconds, peak memory and bytes of every stage, and how far the
UNet's graph is from torch in ONNX Runtime at 256 x 256 pixels. Writes <out>/export.csv. Needs 20 GiB of memory and
30 GB of disk. --small tries the script on a small model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.measure import check_out, environment, results_folder, write_rows
from benchmarks.random_sdxl import save
from runtime.cli.command import Parser, exit_code
from runtime.engines.manifest import read_manifest

TARGET = ("--target", "tensorrt-rtx", "--compute-capability", "8.9", "--precision", "fp16")
SIZES = ("--height", "256:1024:1024", "--width", "256:1024:1024")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m benchmarks.export", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the CSV file")
    parser.add_argument(
        "--work", type=Path, default=Path("out"), help="where model and engines are made, then removed"
    )
    parser.add_argument(
        "--small", action="store_true", help="a small model: tries this script, measures nothing"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Build, compare, write."""
    for folder in (options.out, options.work):
        check_out(folder)
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        model, adapter, engines = (Path(folder) / name for name in ("model", "adapter", "engines"))
        with ProcessPoolExecutor(
            1, get_context("spawn")
        ) as process:  # its memory is the system's again afterwards
            process.submit(save, model, adapter, "fp16", options.small).result()
        call(
            "export.build_engine",
            "--model",
            model,
            "--adapter",
            f"canny={adapter}",
            *TARGET,
            *SIZES,
            "--out",
            engines,
        )
        call(
            "export.verify", engines, "--graphs", "unet", "--smallest", "--json", Path(folder) / "verify.json"
        )
        verified = json.loads((Path(folder) / "verify.json").read_text())["rows"]
        rows = make_rows(read_manifest(engines), verified)
    for row in rows:
        print(*row.values())
    write_rows(options.out / ("export_small.csv" if options.small else "export.csv"), rows)


def call(module: str, *arguments: object) -> None:
    """Run a command line in a process of its own, as a user does."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def make_rows(manifest, verified: list[dict]) -> list[dict]:
    """Return a row for each stage of the build, then one for the largest error of the UNet's graph."""
    here = environment()
    compiler = " ".join(f"{name} {manifest.versions[name]}" for name in ("tensorrt_rtx",))
    rows = [
        {
            "stage": name,
            "seconds": stage["seconds"],
            "peak_gib": round(stage["peak_bytes"] / 2**30, 2),
            "written_gib": round(stage["bytes"] / 2**30, 3),
            "relative_rms": "",
            **here,
            "compiler": compiler,
        }
        for name, stage in manifest.stages.items()
    ]
    worst = max(row["rms"] for row in verified)
    rows.append(
        {
            **dict.fromkeys(rows[0], ""),
            "stage": "unet in ONNX Runtime",
            "relative_rms": f"{worst:.2e}",
            **here,
        }
    )
    return rows


if __name__ == "__main__":
    sys.exit(main())
