"""What the command lines share: one line for bad input, exit codes, and the options that say which model."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from runtime.cli.interrupt import CANCELLED, shown, taken
from runtime.errors import InputError

# For commands, before transformers is imported: it tells of parts that are not used here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class Parser(argparse.ArgumentParser):
    """Refuses empty values: a variable that a script has not set would silently ask for the opposite.

    An option whose value may be empty, as a prompt may, has `type=str`.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register("type", None, _given)
        self.register("type", Path, lambda text: Path(_given(text)))

    def error(self, message: str) -> NoReturn:
        """Return one line, without the usage's page."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _given(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; expected a value, or no such option")
    return text


def exit_code(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Return the exit code of `work`: what it returns, 0 for None; 2 for bad input, in one line; 130 after Ctrl-C.

    Each warning is one line on stderr, too, however often it comes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", ".*decompression bomb")  # Pillow's, of what is refused
            warnings.showwarning = _say_once(set())
            if taken():  # while modules were imported, one of which has swallowed it
                raise KeyboardInterrupt
            return work() or 0
    except (KeyboardInterrupt, Exception) as error:
        if taken() or isinstance(error, KeyboardInterrupt):
            if not shown():
                say(interrupted)
            return CANCELLED
        if not isinstance(error, InputError):
            raise
        say(f"error: {error}")
        return 2


def _say_once(said: set[str]) -> Callable[..., None]:
    def show(message, *_, **__) -> None:
        line = " ".join(f"warning: {message}".split())
        if line not in said:
            said.add(line)
            say(line)

    return show


def say(line: str) -> None:
    """Print a line for the user, on stderr."""
    print(line, file=sys.stderr, flush=True)


def need(what: str, extra: str, modules: Sequence[str]) -> None:
    """Raise InputError, saying what to install, where a package of one of setup.py's extras is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            name = error.name or module
            raise InputError(
                f"{what} needs the package {name.replace('_', '-')}; install it: pip install 'localcontrol[{extra}]'"
            ) from error


@contextmanager
def heartbeat(what: str, every: float = 20.0) -> Iterator[None]:
    """Say what is being done, and that it goes on, for as long as the block takes; seconds between the lines."""
    say(what)
    start, done = time.perf_counter(), threading.Event()

    def beat() -> None:
        while not done.wait(every):
            say(f"  {time.perf_counter() - start:.0f} s so far")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Stop the garbage collector in the block, and keep it from what is there at its end; once in a process.

    A fifth of the seconds in which torch and diffusers are imported went into that, and of those in which the process
    ends: what they make stays.
    """
    if "diffusers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def add_model_sources(group) -> None:
    """Add the options for what a model and its adapters are loaded from, beside --model itself."""
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a T2I-Adapter for SDXL, or a ControlNet, which engines do not take: folder, file or hub id, and the name "
        "regions call it by; may be repeated; of a ControlNet-Union the name says the control (depth, canny-2)",
    )
    group.add_argument("--vae", metavar="PATH", help="another VAE: folder, file or hub id")
    group.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=WEIGHT]", help="fused in; may be repeated"
    )
    group.add_argument(
        "--tokenizer", metavar="FOLDER", help="CLIP's vocabulary, for a single file when offline"
    )
    group.add_argument(
        "--config", metavar="FOLDER", help="diffusers' configs, for a single file of another shape"
    )
    group.add_argument(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what the model predicts, where its files do not say it (default: as they say, or epsilon)",
    )
    group.add_argument(
        "--allow-pickle", action="store_true", help="also read .bin and .ckpt files (tensors only)"
    )
