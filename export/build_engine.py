"""python -m export.build_engine --model MODEL --adapter NAME=PATH --target openvino --out FOLDER

Compiles a model and its adapters to engines that `python -m runtime.generate --engine FOLDER` runs, with other masks,
strengths, prompts, sizes and adapters at run time and no rebuild. --help lists the options.
"""

from __future__ import annotations

# isort: off
import runtime.cli.interrupt  # noqa: F401 -- before the seconds that the other imports take
# isort: on

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.arguments import whole_number
from runtime.cli.command import Parser, add_model_sources, exit_code, say
from runtime.cli.sources import adapter_sources, lora_sources
from runtime.engines.targets import TARGETS
from runtime.errors import InputError
from runtime.machine.files import expand

if TYPE_CHECKING:
    from export.build import BuildSettings
    from export.targets.options import CompileOptions

SMALL = 2**28  # bytes of engines that are compared at every size
MOST_WORDS = 16  # regions with words of their own
COMPONENTS = ("text_encoder", "text_encoder_2", "adapter", "unet", "vae_decoder", "vae_encoder")
EXAMPLES = """\
examples:
  python -m export.build_engine --target openvino --precision bf16 --out engines
  python -m export.build_engine --model sdxl.safetensors --adapter canny=t2i-adapter-canny-sdxl-1.0 \\
      --target tensorrt-rtx --compute-capability 8.9 --precision fp16 --height 768:1024:1536 --width 768:1024:1536 \\
      --out sdxl-rtx
"""


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for bad input (one line on stderr), or 130 where it was interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    again = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    command = "python -m export.build_engine " + shlex.join([*again, "--overwrite"])
    return exit_code(lambda: build(options, command), "interrupted; the same command with --resume goes on")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export.build_engine",
        usage="%(prog)s --target TARGET --out FOLDER [options]",
        description="Compiles a model and its adapters to engines for python -m runtime.generate --engine FOLDER.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_model(parser.add_argument_group("the model"))
    _add_sizes(parser.add_argument_group("the sizes: one, or smallest:usual:largest"))
    _add_target(parser.add_argument_group("the target"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_model(group) -> None:
    group.add_argument("--model", default="embedded", help="as in runtime.generate (default embedded)")
    add_model_sources(group)
    group.add_argument(
        "--components",
        default=",".join(COMPONENTS[:-1]),
        metavar="A,B,...",
        help=f"what to compile, of {', '.join(COMPONENTS)} (default: all but the last); the rest runs with torch",
    )


def _add_sizes(group) -> None:
    group.add_argument("--batch", default="1", help="images a call (default 1)")
    group.add_argument("--height", help="pixels, multiples of 16 (default: the model's own size)")
    group.add_argument("--width", help="likewise")
    group.add_argument(
        "--regional-prompts",
        type=int,
        default=0,
        metavar="N",
        help="regions that can have words of their own; each costs a cross-attention in every picture (default 0)",
    )
    group.add_argument(
        "--guidance",
        choices=("both", "always", "never"),
        default="both",
        help="whether the UNet takes two rows an image, one, or either (default both)",
    )


def _add_target(group) -> None:
    group.add_argument("--target", required=True, choices=TARGETS)
    group.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16", help="(default fp16)")
    group.add_argument(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="X.Y",
        help="GPUs to build for, such as 8.9 12.0 (default: this machine's)",
    )
    group.add_argument(
        "--level", type=int, choices=range(6), help="TensorRT's optimisation level (default 3)"
    )
    group.add_argument(
        "--workspace", type=float, metavar="GIB", help="scratch memory that TensorRT may plan with"
    )
    group.add_argument(
        "--timing-cache", metavar="FILE", help="keeps what TensorRT measured, for the next build"
    )
    group.add_argument("--refit", action="store_true", help="weights can be exchanged: --lora at run time")


def _add_output(group) -> None:
    group.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the engines go, once all are built"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    group.add_argument("--resume", action="store_true", help="go on with a build that was interrupted")
    group.add_argument(
        "--drop-onnx", action="store_true", help="without the ONNX files, which export.verify needs"
    )
    group.add_argument(
        "--no-verify", action="store_true", help="do not compare the engines with torch once they are built"
    )
    group.add_argument("--force", action="store_true", help="build even where memory or disk seem too small")


def build(options: argparse.Namespace, command: str) -> int:
    """Check what can be checked before anything is loaded, build, compare; return 1 where engines compute wrongly."""
    components = options.components.split(",")
    for name in components:
        if name not in COMPONENTS:
            raise InputError(f"--components {name}: expected some of {', '.join(COMPONENTS)}")
    words = whole_number(options.regional_prompts, "--regional-prompts", 0, MOST_WORDS)
    adapters, loras = adapter_sources(options.adapter), lora_sources(options.lora)
    _check_packages()
    from export.build import BuildSettings, build_folder
    from export.targets.compile import check_target

    wanted = tuple(options.compute_capability)
    capabilities = check_target(options.target, options.precision, wanted, options.refit)
    for name in adapters:
        if Path(name).name != name or name == "..":
            raise InputError(f"--adapter {name}: expected a name that a file can have")
    settings = BuildSettings(
        model=options.model,
        adapters=adapters,
        vae=options.vae,
        loras=loras,
        tokenizer=options.tokenizer,
        config=options.config,
        prediction_type=options.prediction_type,
        allow_pickle=options.allow_pickle,
        components=tuple(name for name in COMPONENTS if name in components),
        sizes={"batch": options.batch, "height": options.height, "width": options.width},
        guidance=options.guidance,
        words=words,
        precision=options.precision,
        compiler=compile_options(options, capabilities),
        keep_onnx=not options.drop_onnx,
    )
    folder = expand(options.out, "--out")
    build_folder(
        settings,
        folder,
        command,
        overwrite=options.overwrite,
        resume=options.resume,
        force=options.force,
        say=say,
    )
    return 0 if options.no_verify else int(not compare(settings, folder))


def compile_options(options: argparse.Namespace, capabilities: tuple[str, ...]) -> CompileOptions:
    """Return what the compiler is told. Raises InputError for what the target does not take."""
    from export.targets.compile import GIB
    from export.targets.options import CompileOptions

    for name in ("level", "workspace", "timing_cache"):
        if getattr(options, name) is not None and not TARGETS[options.target].gpu:
            raise InputError(f"--{name.replace('_', '-')}: target {options.target} takes none")
    if options.workspace is not None and not 0 < options.workspace < 2**20:
        raise InputError(f"--workspace {options.workspace}: expected GiB, a number above 0")
    return CompileOptions(
        options.target,
        capabilities,
        3 if options.level is None else options.level,
        int(options.workspace * GIB) if options.workspace else None,
        expand(options.timing_cache, "--timing-cache") if options.timing_cache else None,
        options.refit,
    )


def compare(settings: BuildSettings, folder: Path) -> bool:
    """Compare the engines with torch, where they run on this machine, and note the outcome in the folder.

    Returns whether all are within their tolerance. Small models are compared at the smallest, usual and largest size,
    in this order, large ones at the smallest.
    """
    from export.progress import stage
    from export.verify import device_of, format_row, note_rows, verify
    from runtime.engines.manifest import read_manifest

    manifest = read_manifest(folder)
    if TARGETS[manifest.target].gpu and device_of(folder).type == "cpu":
        say(
            f"not compared with torch: target {manifest.target} needs a GPU; python -m export.verify {folder} does"
        )
        return True
    built = sum(manifest.files[file]["bytes"] for spec in manifest.engines.values() for file in spec.files)
    options = {"smallest": built > SMALL, "engines_only": True, "allow_pickle": settings.allow_pickle}
    with stage("compare with torch", say):
        rows = list(verify(folder, say=say, **options))
    note_rows(folder, rows, whole=True)
    failed = [row for row in rows if not row.passed]
    for row in failed:
        say(format_row(row))
    return not failed


def _check_packages() -> None:
    """Raise InputError, saying what to install, where the exporter's own packages are missing."""
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise InputError(
                f"export needs the package {package}; install it: pip install 'localcontrol[export]'"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
