"""python tests/versions.py [--only NAME] [--keep] [-- PYTEST ARGUMENT ...]

Runs the tests in fresh environments with the oldest and the newest versions that setup.py allows, and prints the table
of CONTRIBUTING.md: the floors there are those that were run. Needs Python 3.10 and 3.13 (python3.10, python3.13, or
those of pyenv), the network, 15 GB of disk and an hour. Uses the standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("torch", "triton", "diffusers", "transformers", "numpy", "peft")


@dataclass(frozen=True)
class Case:
    """An environment: its Python, and whether the packages that setup.py requires are at their floors."""

    name: str
    python: str
    oldest: bool


CASES = (Case("oldest", "3.10", True), Case("newest", "3.13", False))


def main() -> int:
    """Exit code: 0, or 1 where an environment could not be made or a test failed in one."""
    parser = argparse.ArgumentParser(prog="python tests/versions.py", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one of the environments")
    parser.add_argument("--keep", action="store_true", help="leave the environments there, and say where")
    parser.add_argument("arguments", nargs="*", help="of pytest, by default those of `make test`")
    options = parser.parse_args()
    home, passed = Path(tempfile.mkdtemp(prefix="localcontrol-versions-")), True
    print(f"| | Python | {' | '.join(SHOWN)} | tests |\n|{'---|' * (len(SHOWN) + 3)}", flush=True)
    try:
        for case in CASES:
            if options.only in (None, case.name):
                versions, outcome, ok = run(case, home / case.name, options.arguments)
                cells = [case.name, case.python, *(versions.get(name, "") for name in SHOWN), outcome]
                print(f"| {' | '.join(cells)} |", flush=True)
                passed &= ok
    finally:
        if options.keep:
            print(f"environments: {home}", file=sys.stderr)
        else:
            shutil.rmtree(home, ignore_errors=True)
    return 0 if passed else 1


def run(case: Case, folder: Path, arguments: list[str]) -> tuple[dict[str, str], str, bool]:
    """Make the environment and run the tests in it; return its versions, pytest's last line, and whether all passed."""
    subprocess.run([interpreter(case.python), "-m", "venv", folder], check=True)
    python, floors = folder / "bin" / "python", folder / "floors.txt"
    floors.write_text("".join(f"{line}\n" for line in (floor_lines() if case.oldest else ())))
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", floors]
    if subprocess.run([*install, "-e", f"{ROOT}[dev]"], check=False).returncode:
        return {}, "cannot be installed", False
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], stdout=subprocess.PIPE, check=True
    )
    versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    tests = arguments or ["-m", "not slow and not gpu and not ray", "-n", "auto"]
    log = ROOT / "out" / f"versions-{case.name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [python, "-m", "pytest", *tests], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    lines = log.read_text().strip().splitlines()
    last = next(
        (line for line in reversed(lines) if re.search(r"\d (passed|failed)", line)), lines[-1]
    ).strip("= ")
    return versions, last, done.returncode == 0


def floor_lines() -> Iterator[str]:
    """Yield "package==floor" for every package that setup.py requires."""
    required = re.search(r"REQUIREMENTS = \[(.*?)\n\]", (ROOT / "setup.py").read_text("utf-8"), re.S)[1]
    for name, floor in re.findall(r"""["']([a-z0-9_-]+)>=([0-9.]+)""", required):
        yield f"{name}=={floor}{'' if '.' in floor else '.0'}.*"


def interpreter(version: str) -> str:
    """Return a Python of this version: on the path, or pyenv's. Exits, saying what is missing, where there is none."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for found in (*map(str, pyenv), f"python{version}"):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run([found, "-c", code], capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.stdout.strip() == version:
            return found
    raise SystemExit(f"error: Python {version}: not found; install it as python{version}, or with pyenv")


if __name__ == "__main__":
    sys.exit(main())
