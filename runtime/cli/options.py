"""The command line of `runtime.generate`: its options."""

from __future__ import annotations

import argparse

from runtime.cli.command import Parser, add_model_sources
from runtime.cli.presets import PRESETS
from runtime.cli.regions import REGION_KEYS

EXAMPLES = """\
examples:
  python -m runtime.generate --prompt "a yellow star at night" --condition examples/sketch.png \\
      --preprocess sketch --mask examples/mask-left.png --out out.png --sheet sheet.png
  python -m runtime.generate --engine engines --prompt "a yellow star at night" --out out.png
  python -m runtime.generate --model sdxl.safetensors --adapter canny=t2i-adapter-canny-sdxl-1.0 \\
      --prompt "a stone cottage by a lake" --height 1024 --width 1024 \\
      --region condition=house.jpg,preprocess=canny,mask=left.png,scale=0.9,end=0.7 \\
      --region condition=tree.jpg,preprocess=canny,mask=right.png --out cottage.png
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m runtime.generate",
        usage="%(prog)s --prompt TEXT [--condition IMAGE --mask IMAGE] [--out FILE.png] [options]",
        description="Text-to-image with SDXL, with controls that act only inside painted regions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_picture(parser.add_argument_group("the picture"))
    _add_region(parser.add_argument_group("one region"))
    _add_regions(parser.add_argument_group("several regions"))
    add_model(parser.add_argument_group("the model"))
    add_speed(parser.add_argument_group("speed and memory"))
    _add_output(parser.add_argument_group("output"))
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options; what a preset sets is the default of those that are not given."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.preset is None:
        return options
    parser.set_defaults(**PRESETS[options.preset])
    return parser.parse_args(arguments)


def _add_picture(group) -> None:
    group.add_argument("--prompt", required=True, type=str, help="what to draw")
    group.add_argument(
        "--negative-prompt", type=str, default="", metavar="TEXT", help="what to keep away from"
    )
    group.add_argument("--image", metavar="FILE", help="start from this picture, at its own size by default")
    group.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="the share of the steps that are run on --image: the less, the more of it stays (default 1)",
    )
    group.add_argument(
        "--outside",
        choices=("free", "held"),
        default="free",
        help="held: outside the masks every pixel stays that of --image, or of this seed's picture without control "
        "(default free)",
    )
    group.add_argument(
        "--prompt-syntax",
        choices=("plain", "a1111"),
        default="plain",
        help="a1111: (word:1.3), [word], BREAK are weights and chunks, AND joins prompts (default plain)",
    )
    group.add_argument(
        "--clip-skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out N more of the text encoders' last layers (default 0)",
    )
    group.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: the model's own size)")
    group.add_argument("--width", type=int, help="likewise")
    _add_sampling(group)


def _add_sampling(group) -> None:
    group.add_argument("--steps", type=int, default=30, help="denoising steps (default 30)")
    group.add_argument(
        "--guidance", type=float, default=5.0, help="classifier-free guidance; 1 or less: none (default 5)"
    )
    group.add_argument(
        "--guidance-range",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("START", "END"),
        help="the part of the steps with guidance, as fractions: the others take half the time (default 0 1)",
    )
    group.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="keep strong guidance from overexposing, 0 to 1; 0.7 suits v-prediction models (default 0)",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="scheduler, steps and guidance that go together; options beside it override. lightning4, lcm4 and turbo1 "
        "are for models and LoRAs that were distilled to so few steps",
    )
    group.add_argument(
        "--cache-interval",
        type=int,
        default=1,
        metavar="N",
        help="compute the UNet's deep features at every Nth step only (default 1; lossy above)",
    )
    group.add_argument("--seed", type=int, help="of the first image, the next has seed + 1 (default: drawn)")
    group.add_argument("--images", type=int, default=1, metavar="N", help="how many (default 1)")
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        help="euler, euler_trailing, euler_a, dpm++2m, dpm++2m_karras, ddim, unipc, lcm ... or any scheduler "
        "class of diffusers "
        "(default: the model's own)",
    )


def _add_region(group) -> None:
    group.add_argument("--condition", metavar="IMAGE", help="what the control shows")
    group.add_argument(
        "--preprocess",
        metavar="NAME",
        help="compute the condition of the image: canny, sobel, sketch, color, depth (default none: it is one)",
    )
    group.add_argument("--mask", metavar="IMAGE", help="where it acts, white = control (default: everywhere)")
    group.add_argument(
        "--control", metavar="NAME", help="the adapter that reads it (default: the first --adapter, or canny)"
    )
    group.add_argument(
        "--region-prompt", type=str, metavar="TEXT", help="words that take the prompt's place inside the mask"
    )
    group.add_argument("--scale", help="its strength (default 1), or keyframes of it, such as 0:1.0,0.5:0.3")
    group.add_argument("--start", help="the share of the steps after which it begins to act (default 0)")
    group.add_argument(
        "--end",
        help="the share of the steps after which it stops (default 1), or a fade, such as 0.5:1,0.8:0",
    )
    group.add_argument(
        "--uncond-scale", help="the share of its strength in guidance's unguided half (default 1)"
    )
    group.add_argument(
        "--levels", metavar="A:B:C:D", help="factors on the strength from the finest level to the coarsest"
    )
    group.add_argument(
        "--mask-condition",
        action="store_const",
        const=True,
        help="also blank the condition outside the mask, so that nothing of it there can reach the picture",
    )


def _add_regions(group) -> None:
    group.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help=f"one region, may be given several times; keys: {REGION_KEYS}",
    )
    group.add_argument(
        "--regions",
        metavar="FILE.json",
        help="a list of objects with the same keys; paths are relative to the file's folder",
    )


def add_model(group) -> None:
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="embedded, a diffusers folder, a .safetensors file or a hub id (default embedded)",
    )
    group.add_argument(
        "--engine",
        metavar="FOLDER",
        help="run on the engines that python -m export.build_engine wrote; --model is then only needed for parts "
        "that were not compiled, --adapter adds adapters, --lora needs engines built with --refit",
    )
    add_model_sources(group)
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    group.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 or fp16 on a GPU, fp32 on a CPU"
    )
    group.add_argument(
        "--backend",
        choices=("auto", "triton", "torch"),
        default="auto",
        help="of the kernels; auto (the default) also takes an engine that runtime.fastest found faster here",
    )


def add_speed(group) -> None:
    group.add_argument(
        "--attention",
        metavar="NAME",
        help="auto, flash, cudnn, efficient, math, xformers, flash_attn (default auto: PyTorch chooses)",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the UNet and the VAE: minutes, the first time"
    )
    group.add_argument(
        "--cuda-graph", action="store_true", help="capture a step, text encoders and adapters as CUDA graphs"
    )
    group.add_argument(
        "--quantize",
        metavar="NAME",
        help="fp8: linear layers in float8; fp8-weights: weights kept in it, to save memory (lossy)",
    )
    group.add_argument(
        "--offload",
        metavar="NAME",
        help="of a GPU with little memory: model: its parts take turns on it; group: so do the UNet's layers",
    )
    group.add_argument(
        "--vae-tiling",
        action="store_true",
        help="decode pictures larger than the model's own in tiles (lossy)",
    )


def _add_output(group) -> None:
    group.add_argument(
        "--out",
        default="out.png",
        metavar="FILE.png",
        help="the picture; of several, the second is FILE-1.png and so on (default out.png)",
    )
    group.add_argument(
        "--sheet", metavar="FILE.png", help="condition, mask, result and its edges in one picture"
    )
    group.add_argument(
        "--metadata",
        choices=("full", "plain", "none"),
        default="plain",
        help="the settings that a PNG's text has: full, plain (no absolute path or user name), or none (default plain)",
    )
    group.add_argument("--report", metavar="FILE.json", help="timings, memory, versions, seed and settings")
