"""python -m runtime.serve: a process, its signals, and what it refuses to begin with."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from runtime.serve.__main__ import PACKAGES, main
from tests.support import saved_model
from tests.support.server import Client


class Process:
    """A server of its own process, on the tiny model."""

    def __init__(self, folder, *options, environment=None):
        self.folder = folder
        arguments = ["--model", str(saved_model.folder()), "--data", str(folder), "--port", "0", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime.serve", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.match(r"serving  http://127.0.0.1:(\d+)", line):
                self.client = Client(int(found[1]), None)
                break
        end = time.monotonic() + 60
        while self.client.get("/readyz")[0] != 200:
            assert time.monotonic() < end
            time.sleep(0.02)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=60)
        self.said += rest.splitlines(keepends=True)
        return self.process.returncode


@pytest.fixture
def server(tmp_path):
    processes = []

    def start(*options, **more):
        processes.append(Process(tmp_path / "data", *options, **more))
        return processes[-1]

    yield start
    for each in processes:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


BODY = {"prompt": "a", "height": 64, "width": 64, "steps": 100, "seed": 1}


def job(client, **change):
    status, _, data = client.post("/v1/jobs", {**BODY, **change})
    assert status == 202, data
    return json.loads(data)["id"]


def test_sigterm_ends_what_runs_and_keeps_what_waits(server):
    first = server("--rows", "2")
    runs, waits = job(first.client), job(first.client)
    first.client.job(runs, until=("running",))
    assert first.end() == 0
    assert any("ending: what runs is finished" in line for line in first.said)
    assert not any("Traceback" in line for line in first.said)
    second = server()
    assert second.client.job(runs)["state"] == "done"
    assert second.client.job(waits, until=("interrupted",))["error"]["message"].startswith(
        "server: it is ending"
    )
    assert second.client.post(f"/v1/jobs/{waits}/retry")[0] == 202
    assert second.client.job(waits, until=("done",))["result"]["seed"] == 1


def test_work_that_takes_too_long_to_end_is_interrupted(server):
    first = server("--drain-seconds", "0.2")
    long = job(first.client, height=256, width=256)
    first.client.job(long, until=("running",))
    start = time.monotonic()
    assert first.end() == 0 and time.monotonic() - start < 15  # all its steps take minutes
    assert server().client.job(long)["state"] == "interrupted"


def test_killed_it_has_every_job_afterwards(server):
    first = server()
    ids = [job(first.client, steps=5, seed=i) for i in range(8)]
    time.sleep(0.05)
    first.end(signal.SIGKILL)
    second = server()
    states = {id: second.client.job(id)["state"] for id in ids}
    assert set(states.values()) <= {"done", "interrupted"}
    for id, state in states.items():
        if state == "done":
            assert second.client.get(f"/v1/jobs/{id}/images/0")[0] == 200


def test_ctrl_c_is_a_signal_to_end_too(server):
    first = server()
    assert first.end(signal.SIGINT) == 0


def test_a_second_server_of_the_same_data_is_refused(server, tmp_path, capsys):
    server()
    assert main(["--model", str(saved_model.folder()), "--data", str(tmp_path / "data"), "--port", "0"]) == 2
    assert f"--data {tmp_path / 'data'}: in use (process" in capsys.readouterr().err


def test_a_port_in_use(server, tmp_path, capsys):
    port = str(server().client.port)
    assert main(["--data", str(tmp_path / "other"), "--port", port]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: --host 127.0.0.1 --port {port}: Address already in use; try"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: others can reach it; expected keys in LOCALCONTROL_API_KEYS",
        ),
        (["--port", "70000"], "--port 70000: expected 0 to 65535"),
        (["--queue", "0"], "--queue 0: expected a number of 1 or more"),
        (["--kept-hours", "0.0008"], "--kept-hours 0.0008: expected a number of 0.001 or more"),
        (["--model", "nothing/here.safetensors", "--port", "0"], "nothing/here.safetensors"),
    ],
)
def test_bad_options_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOCALCONTROL_API_KEYS", raising=False)
    assert main(["--data", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and said[-1].startswith("error: ")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_not_installed_is_one_line_before_anything_is_loaded(package, tmp_path):
    """In a process of its own: here the server's modules are imported already."""
    code = (
        f"import sys; sys.modules[{package!r}] = None; from runtime.serve.__main__ import main\n"
        f"code = main(['--data', {str(tmp_path)!r}]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"error: serve needs the package {package.replace('_', '-')}; install it: pip install"
    assert (done.returncode, done.stderr) == (2, f"{said} 'localcontrol[serve]'\n")


def test_keys_come_from_the_environment(server):
    first = server("--host", "127.0.0.1", environment={"LOCALCONTROL_API_KEYS": "one,two"})
    assert first.client.post("/v1/generate", BODY)[0] == 401
    connection = http.client.HTTPConnection("127.0.0.1", first.client.port)
    connection.request("GET", "/v1/capabilities", headers={"Authorization": "Bearer two"})
    assert connection.getresponse().status == 200
    connection.close()
