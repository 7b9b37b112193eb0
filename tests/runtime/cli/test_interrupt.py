"""runtime.cli.interrupt: Ctrl-C while a command still imports is one line, as later."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

COMMANDS = {
    "runtime.generate": ["--prompt", "x", "--steps", "1000"],
    "runtime.fastest": ["--engine", "x"],
    "export.build_engine": ["--target", "openvino", "--out", "x"],
    "export.verify": ["x"],
    "training.train_adapter": ["--data", "x", "--out", "x"],
}


def heed_interrupts():
    """In a child: a shell has the programs that it runs in the background ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("module", COMMANDS)
def test_an_interrupt_during_imports_is_one_line(module, tmp_path):
    wait = random.Random(module).uniform(0.3, 0.9)
    call = [sys.executable, "-m", module, *COMMANDS[module]]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        call, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts
    ) as run:
        time.sleep(wait)
        run.send_signal(signal.SIGINT)
        said = run.stderr.read()
    assert said.startswith("interrupted") and said.count("\n") == 1, said
    assert run.returncode in (130, -signal.SIGINT)


@pytest.mark.parametrize(
    "made", ["ImportError('numpy')", "SystemError('error return')", "RecursionError('x')"]
)
def test_what_an_extension_makes_of_an_interrupt_is_one_line(made):
    code = f"""
import os, signal
import runtime.cli.interrupt
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt as error:
    raise {made} from error
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=heed_interrupts
    )
    assert (run.stderr, run.returncode) == ("interrupted\n", 130)


def test_what_an_extension_prints_and_goes_on_from_is_told_once():
    """Some print the error of an import that failed (PyErr_Print calls the hook), and go on."""
    code = """
import os, signal, sys
import runtime.cli.interrupt
from runtime.cli.command import exit_code
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt as error:
    sys.excepthook(type(error), error, error.__traceback__)
sys.exit(exit_code(lambda: print("goes on")))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=heed_interrupts
    )
    assert (run.stdout, run.stderr, run.returncode) == ("", "interrupted\n", 130)


def test_other_errors_are_shown_as_ever():
    code = "import runtime.cli.interrupt\nimport no_such_module"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: No module named 'no_such_module'" in run.stderr and run.returncode == 1
