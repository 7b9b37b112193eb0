"""Small training runs for tests: scenes of the embedded model's world, and the command line in this process."""

from pathlib import Path

from training import train_adapter
from training.embedded.scenes import write_scenes

SCENES = 14
QUICK = (
    "--adapter-blocks=1", "--batch=2", "--steps=6", "--dtype=fp32", "--workers=0", "--tracker=none", "--lr=1e-3",
    "--validate-every=0", "--validation-samples=2", "--save-every=2",
)  # fmt: skip


def make_scenes(folder: Path) -> Path:
    write_scenes(folder, SCENES)
    return folder


def train(data: Path, out: Path, *more: str) -> int:
    """The exit code of a quick run; runs of one data folder share their cache."""
    return train_adapter.main(command(data, out, *more))


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [f"--data={data}", f"--out={out}", f"--cache={data.parent / 'cache'}", *QUICK, *more]
