"""The batch on Ray Data: whatever is killed, each picture is there once, and the one that this machine alone draws."""

import hashlib
import json
import random
import signal
import subprocess
import time

import pytest
from PIL import Image

from runtime.batch import cluster
from runtime.batch.__main__ import main, make_parser
from runtime.batch.results import Results
from runtime.cli.cluster import replicas
from runtime.serve.schema import Generate
from tests.support.cluster import PLACED, command, kill_worker, nodes
from tests.support.server import pipe

COUNT = 300


def requests(folder):
    """Write requests, some with a control in a region, and a bad one."""
    Image.linear_gradient("L").resize((64, 64)).save(folder / "a.png")
    region = {"condition": "a.png", "mask": "a.png", "adapter": "canny"}
    lines = [
        {"prompt": f"a star, number {i}", "seed": i, "steps": 1, "guidance": 1.0, "height": 64, "width": 64}
        | ({"regions": [region]} if i % 3 == 0 else {})
        for i in range(COUNT)
    ]
    lines.insert(7, {"prompt": "bad", "steps": 0})
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("??/*.png")}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_whatever_is_killed_each_picture_is_there_once(tmp_path):
    lines, out, whole, choose = requests(tmp_path), tmp_path / "out", tmp_path / "whole", random.Random(5)
    alone = command("runtime.batch", lines, whole, "--deterministic", stderr=subprocess.DEVNULL)
    with nodes() as machines:
        given = lines, out, "--deterministic", "--rows", 8, "--ray", machines.cluster.address, *PLACED
        first = command("runtime.batch", *given, stderr=subprocess.DEVNULL)
        assert kill_once(first, out, choose.randint(1, 40), lambda: kill_worker("Replica"))
        assert kill_once(first, out, choose.randint(60, 100), lambda: (machines.remove(), machines.add()))
        assert kill_once(first, out, choose.randint(150, 200), lambda: first.send_signal(signal.SIGKILL))
        first.wait(60)
        assert 0 < len(hashes(out)) < COUNT
        last = command("runtime.batch", *given, stderr=subprocess.PIPE)
        said = last.communicate(timeout=120)[1]
        assert last.returncode == 1, said
    assert alone.wait(120) == 1  # for the bad one
    found = hashes(out)
    assert len(found) == COUNT and found == hashes(whole), said
    other = [path for path in out.rglob("*") if path.is_file() and path.suffix not in (".png", ".parquet")]
    assert other == [out / ".lock"]
    rows = Results(out).read()
    assert len(rows) == len({row["id"] for row in rows}) == COUNT + 1
    assert [row["source"] for row in rows if row["error"]] == ["requests.jsonl:8"]


def kill_once(run, out, count, kill):
    """Kill once so many pictures are there. Returns whether the run still went on."""
    end = time.monotonic() + 120
    while len(hashes(out)) < count and run.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    going = run.poll() is None
    kill()
    return going


def test_a_block_has_a_row_for_each_request_with_its_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.batch.cluster.load", lambda options: pipe())
    replica = cluster.Replica(make_parser().parse_args(["x", "y"]))
    try:
        Image.new("L", (64, 32), 255).save(tmp_path / "wide.png")
        wide = {"prompt": "a", "steps": 1, "seed": 5, "height": 64, "width": 64,
                "regions": [{"prompt": "b", "mask": "wide.png"}]}  # fmt: skip
        bad = {**wide, "regions": [{"prompt": "b", "mask": "none.png"}]}
        bodies = [Generate(**each).model_dump_json() for each in (wide, bad)]
        block = {"id": ["w", "b"], "source": ["r:1", "r:2"], "base": [str(tmp_path)] * 2, "body": bodies}
        found = replica(block)
    finally:
        replica.drawer.__exit__()
        replica._held.close()
    rows = {id: {name: column[i] for name, column in found.items()} for i, id in enumerate(found["id"])}
    assert cluster.picture_of(rows["w"]).seed == 5 and rows["w"]["png"].startswith(b"\x89PNG")
    assert "stretched" in rows["w"]["warnings"]
    assert cluster.picture_of(rows["b"]).error.status == 404 and "none.png" in rows["b"]["error"]


@pytest.mark.parametrize(
    "options", [["--replicas", "2"], ["--replica-resource", "x"], ["--ray", "--device", "cuda:1"]]
)
def test_options_of_ray_alone_are_refused_without_it(options, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text("{}")
    assert main([str(tmp_path / "r.jsonl"), str(tmp_path / "out"), *options]) == 2
    assert "--" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "2:1", "a", "1:2:3", "-1", ""])
def test_a_number_of_replicas_that_is_none_is_refused(text):
    from argparse import Namespace

    from runtime.errors import InputError

    with pytest.raises(InputError, match="--replicas"):
        replicas(Namespace(replicas=text))
