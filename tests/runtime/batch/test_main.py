"""The command: killed at any moment and run again, it has drawn each picture once, and the same."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime.batch.__main__ import main
from runtime.batch.results import Results

ROOT = Path(__file__).parents[3]
COUNT = 24


def requests(path):
    lines = [
        {"prompt": f"a star, number {i}", "seed": i, "steps": 2 + i % 4, "height": 64, "width": 64}
        for i in range(COUNT)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(*arguments):
    """The command in a process of its own, with as many threads as this one has."""
    command = [sys.executable, "-m", "runtime.batch", *map(str, arguments), "--deterministic"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("??/*.png")}


def test_killed_and_run_again_until_it_is_done(tmp_path):
    requests(tmp_path / "requests.jsonl")
    choose, killed = random.Random(3), tmp_path / "killed"
    for _ in range(2):
        run, before, end = (
            start(tmp_path / "requests.jsonl", killed),
            len(hashes(killed)),
            time.monotonic() + 60,
        )
        while run.poll() is None and len(hashes(killed)) == before and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.2))
        run.send_signal(signal.SIGKILL)
        run.communicate()
    for folder in (killed, tmp_path / "whole"):
        assert main([str(tmp_path / "requests.jsonl"), str(folder), "--deterministic"]) == 0
    found, expected = hashes(killed), hashes(tmp_path / "whole")
    assert len(expected) == COUNT and found == expected
    rows = Results(killed).read()
    assert len(rows) == COUNT and {Path(row["file"]).name for row in rows} == set(found)
    assert not any(row["error"] for row in rows)


def test_bad_input_is_one_line_and_a_bad_request_is_counted(tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.jsonl'}: ")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "steps": -1}\n')
    file = tmp_path / "out"
    file.write_text("")
    assert main([str(tmp_path / "a.jsonl"), str(file)]) == 2
    assert "expected a folder" in capsys.readouterr().err
    report = tmp_path / "report.json"
    assert main([str(tmp_path / "a.jsonl"), str(tmp_path / "pictures"), "--report", str(report)]) == 1
    assert json.loads(report.read_text())["counts"] == {"drawn": 0, "there": 0, "refused": 1, "failed": 0}
    assert "1 refused" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--rows", "-1"], ["--report", "/nowhere/report.json"]])
def test_an_option_is_refused_before_anything_is_loaded(tmp_path, capsys, option):
    requests(tmp_path / "a.jsonl")
    assert main([str(tmp_path / "a.jsonl"), str(tmp_path / "out"), *option]) == 2
    assert option[0] in capsys.readouterr().err and not (tmp_path / "out").exists()
