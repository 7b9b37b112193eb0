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


@pytest.mark.parametrize("module", COMMANDS)
def test_an_interrupt_during_imports_is_one_line(module, tmp_path):
    wait = random.Random(module).uniform(0.3, 0.9)
    call = [sys.executable, "-m", module, *COMMANDS[module]]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment) as run:
        time.sleep(wait)
        run.send_signal(signal.SIGINT)
        said = run.stderr.read()
    assert said.startswith("interrupted") and said.count("\n") == 1, said
    assert run.returncode in (130, -signal.SIGINT)
