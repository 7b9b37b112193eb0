"""python -m training.embedded.scenes --out scenes [--count 1000]

Writes scenes of the embedded model's world as an image folder with captions: data to try the trainer on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from runtime.arguments import whole_number
from runtime.cli.command import Parser, exit_code
from runtime.errors import InputError
from training.embedded.vae import SIZE
from training.embedded.world import render, sample_scene


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m training.embedded.scenes", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, required=True, help="the folder")
    parser.add_argument("--count", type=int, default=1000, help="how many scenes")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write them. Raises InputError where there is nothing to write, or nowhere."""
    count = whole_number(args.count, "count")
    try:
        write_scenes(args.out.expanduser(), count)
    except OSError as error:
        raise InputError(f"out {args.out}: cannot be written: {error.strerror or error}") from error


def write_scenes(folder: Path, count: int) -> None:
    """Scene i as 00000i.png and 00000i.txt; the same ones every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = sample_scene(i)
        Image.fromarray(render(scene, SIZE)).save(folder / f"{i:06d}.png")
        (folder / f"{i:06d}.txt").write_text(scene.caption + "\n")


if __name__ == "__main__":
    sys.exit(main())
