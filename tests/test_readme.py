"""The READMEs: figures are those of the files they name, links lead somewhere, commands have the options they show."""

import csv
import inspect
import re
import statistics
from pathlib import Path

import pytest

from runtime import LocalControlPipeline
from runtime.cli.options import make_parser
from runtime.cli.presets import PRESETS
from runtime.loading.load import load_model
from runtime.serve.limits import Limits

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
READMES = [
    "README.md",
    "CONTRIBUTING.md",
    *(
        f"{folder}/README.md"
        for folder in (
            "kernels",
            "export",
            "training",
            "benchmarks",
            "benchmarks/quality",
            "runtime",
            "runtime/serve",
            "runtime/serve/cluster",
            "tests",
        )
    ),
]
MIB = 2**20


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(readme: str, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with `first`."""
    lines = (ROOT / readme).read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_launch_table_is_its_files():
    measured = {}
    for row in read(RESULTS / "launches.csv"):
        measured.setdefault((row["op"], row["variant"], row["shape"]), {})[row["way"]] = row
    rows = table("kernels/README.md", "op")
    assert len(rows) >= 6
    for name, shape, *shown in rows:
        op, variant = re.fullmatch(r"`(\w+)`(?:, )?(.*)", name).groups()
        ways = measured[op, variant, shape]
        columns = ("launches_plain", "launches", "bytes_plain", "bytes")
        for column, cell in zip(columns, shown, strict=True):
            found = [ways[way][column] for way in ("forward", "forward+backward") if way in ways]
            if column.startswith("bytes"):
                found = [f"{int(value) / MIB:.1f}" for value in found]
            assert cell == " / ".join(found), (name, column)


def test_the_table_of_steps_is_its_file():
    shown = []
    for row in read(RESULTS / "steps.csv"):
        moved, allocated = (f"{int(row[name]) / 2**30:.1f}" for name in ("moved", "allocated"))
        shown.append([row["step"], row["side"], row["launches"], moved, row["allocations"], allocated])
    assert table("kernels/README.md", "step") == shown


def test_the_pictures_times_are_their_files():
    measured = [row for row in read(RESULTS / "cpu" / "latency.csv") if row["dtype"] == "fp32"]
    text = (ROOT / "README.md").read_text("utf-8")
    for row in measured:
        for field in ("device", "torch", "commit"):
            assert row[field] in text
    times = {(row["runtime"], row["batch"]): float(row["p50_ms"]) for row in measured}
    rows = table("README.md", "embedded model, 128 x 128")
    assert len(rows) == 6
    for name, *cells in rows:
        for batch, time, factor in (("1", *cells[:2]), ("8", *cells[2:])):
            layouts = [name, name.replace("diffusers", "diffusers channels_last")]
            own = min(times[layout, batch] for layout in layouts if (layout, batch) in times)
            theirs = min(times[side, batch] for side in ("diffusers", "diffusers channels_last"))
            assert time == f"{own:.0f} ms" and factor == f"{theirs / own:.2f} x", (name, batch)


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme):
    path = ROOT / readme
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link


@pytest.mark.parametrize("readme", READMES)
def test_named_files_and_modules_are_there(readme):
    text = (ROOT / readme).read_text("utf-8")
    for name in re.findall(r"`((?:runtime|kernels|export|training|benchmarks|tests)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m ((?:runtime|export|training|benchmarks)[\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_runtimes_table_has_its_folders():
    named = re.findall(r"^\|.*?`(\w+)/`", (ROOT / "runtime/README.md").read_text(), re.MULTILINE)
    there = {path.parent.name for path in ROOT.glob("runtime/*/__init__.py")}
    assert set(named) == there


@pytest.mark.parametrize("readme", ["README.md", "runtime/README.md"])
def test_the_options_of_the_table_exist(readme):
    text = (ROOT / readme).read_text("utf-8")
    known = make_parser().format_help()
    shown = re.findall(r"^\| `(--[^|]*)", text, re.M)
    assert len(shown) >= 7
    for option in re.findall(r"--[\w-]+", " ".join(shown)):
        assert option in known, option


def test_make_help_has_every_target():
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()) - {"help"}
    assert set(re.findall(r'@echo "make ([\w-]+) ', text)) == targets


def test_the_options_in_python_are_parameters():
    text = " ".join((ROOT / "runtime/README.md").read_text("utf-8").split())
    own = re.search(r"`from_pretrained` takes (.*?); a call takes (.*?)\. `--cuda-graph` is", text)
    loading, call = (re.findall(r"`(\w+)`", part) for part in own.groups())
    pipeline = LocalControlPipeline
    takes = {
        *inspect.signature(pipeline.from_pretrained).parameters,
        *inspect.signature(load_model).parameters,
    }
    assert loading and set(loading) <= takes
    assert call and set(call) <= set(inspect.signature(pipeline.__call__).parameters)
    assert set().union(*PRESETS.values()) <= set(call)


def test_the_servers_bounds_are_its_limits():
    text = " ".join((ROOT / "runtime/serve/README.md").read_text("utf-8").partition("## Bounds")[2].split())
    a = Limits()
    for said in (
        f"{a.body_mib} MiB of a body, {a.megapixels:.0f} million pixels and {a.side:,} px a side",
        f"{a.regions} regions, {a.images} pictures, {a.steps} steps, {a.characters:,} characters",
        f"{a.queue} requests that wait ({a.queue_per_key} of a key",
        f"{a.queued_seconds:.0f} s of waiting, {a.running_seconds:.0f} s of running",
        f"{a.jobs:,} jobs and {a.files:,} files, {a.kept_mib // 1024} GiB of each, for {a.kept_hours:.0f} hours",
        f"for {a.patience:.0f} s; then nobody",
        f"{a.oversize:.0f} times the rows",
        f"what runs has {a.drain_seconds:.0f} s",
    ):
        assert said in text, said


def test_the_serving_tables_are_their_file():
    """Medians over the runs of each load, as the benchmark's own table has them."""
    measured = read(RESULTS / "cpu" / "serving.csv")
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    assert {f"commit {row['commit']}: [serving.csv]" in text for row in measured} == {True}
    short = "p95 of requests of at most 8 steps, ms, arriving at random"
    tables = (
        ("pictures a second", "clients", ("1", "4", "8", "16"), "images_per_s", 2),
        (short, "rate", ("0.5", "0.9", "1.5"), "short_p95_ms", 0),
    )
    for head, axis, points, column, digits in tables:
        rows = table("benchmarks/README.md", head)
        assert len(rows) == 3
        for policy, *cells in rows:
            for point, cell in zip(points, cells, strict=True):
                runs = [float(r[column]) for r in measured if r["policy"] == policy and r[axis] == point]
                assert cell == f"{statistics.median(runs):.{digits}f}", (policy, point)


def test_what_ray_costs_is_its_file():
    found = {row["measure"]: row for row in read(RESULTS / "cpu" / "cluster.csv")}
    rows = table("runtime/serve/cluster/README.md", "process")
    assert len(rows) == 6
    for name, cpu, memory in rows:
        process = name.partition(":")[0]
        assert cpu == f"{float(found[f'{process}, CPU a request']['value']):.1f}"
        assert memory == f"{float(found[f'{process}, memory']['value']):.0f}"
    text = " ".join((ROOT / "runtime/serve/cluster/README.md").read_text("utf-8").split())
    rays = float(found["Ray's part of it"]["value"])
    assert f"of which Ray has {rays:.1f} ms" in text
    assert f"commit {found['start, plain']['commit']}: [cluster.csv]" in text
    simulated = [row for row in read(RESULTS / "cpu" / "cluster_simulation.csv") if row["ingress"] == "one"]
    most = max(float(row["pictures_per_s"]) for row in simulated)
    assert f"at {most:.0f} pictures a second" in text


def test_the_pages_table_is_its_file():
    measured = read(RESULTS / "cpu" / "page.csv")
    found = {(row["backend"], row["measure"].removeprefix("of it: ")): row for row in measured}
    text = " ".join((ROOT / "benchmarks" / "README.md").read_text("utf-8").split())
    rows = table("benchmarks/README.md", "ms, p50 (p95)")
    assert len(rows) == 7
    for name, *cells in rows:
        for backend, cell in zip(("torch", "engines-openvino-fp32"), cells, strict=True):
            row = found[backend, name.partition(":")[0]]
            assert cell == f"{float(row['p50']):.0f} ({float(row['p95']):.0f})" and row["unit"] == "ms"
            assert f"commit {row['commit']}: [page.csv]" in text
    for backend, name in (("torch", "PyTorch"), ("engines-openvino-fp32", "OpenVINO")):
        pace = float(found[backend, "pictures a second while painting"]["p50"])
        assert f"{pace:.1f} pictures a second on {name}" in text
