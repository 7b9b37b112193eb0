"""python -m benchmarks.quality: what it writes, and what it refuses."""

import csv

import pytest
from PIL import Image

from benchmarks.measure import results_folder
from benchmarks.quality import __main__ as quality
from tests.benchmarks.quality.test_samples import picture


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(quality, "DIVERSITY_SAMPLES", 1)
    monkeypatch.setattr(quality, "DIVERSITY_SEEDS", range(2))
    monkeypatch.setattr(quality, "CURVE_SAMPLES", 1)
    monkeypatch.setattr(quality.curves, "SWEEPS", {"scale": (0.0, 1.0), "end": (0.5, 1.0)})


def test_a_run_writes_tables_pictures_and_a_report(tmp_path, capsys):
    arguments = [
        "--count",
        "2",
        "--masks",
        "half",
        "--steps",
        "2",
        "--curves",
        "--out",
        str(tmp_path / "new"),
    ]
    assert quality.main(arguments) == 0
    assert capsys.readouterr().out.startswith("2 pictures: ")
    out = tmp_path / "new"
    assert [row["number"] for row in read(out / "pictures.csv")] == ["0", "1"]
    found, free = (
        {row["figure"]: row for row in read(out / "summary.csv") if row["pictures"] == pictures}
        for pictures in ("with control", "without")
    )
    assert found["lfmse_inside"]["n"] == "2" and found["leakage"]["device"] and found["leakage"]["commit"]
    assert {"perceptual", "shapes", "diversity_outside"} <= found.keys()
    assert float(free["leakage"]["mean"]) == 0 < float(free["lfmse_inside"]["mean"])
    assert float(free["diversity_outside"]["mean"]) > 0
    assert {(r["field"], r["value"]) for r in read(out / "curves.csv")} == {
        ("scale", "0.0"), ("scale", "1.0"), ("end", "0.5"), ("end", "1.0")
    }  # fmt: skip
    report = (out / "report.md").read_text()
    for name in ("leakage.png", "sheet.png", "curves.png"):
        assert f"]({name})" in report and min(Image.open(out / name).size) > 100
    assert f"| lfmse_inside | {float(found['lfmse_inside']['mean']):.3g} (" in report


def test_a_users_folder_is_measured_without_prompts(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    picture(0, (64, 64)).save(data / "a.png")
    (data / "a.txt").write_text("a thing")
    arguments = ["--data", str(data), "--size", "64", "--without-prompt", "--masks", "centre", "--steps", "2"]
    assert quality.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (row,) = read(tmp_path / "out" / "pictures.csv")
    assert row["prompted"] == "False" and row["mask"] == "centre" and "shapes" not in row


def test_a_file_in_the_way_is_found_before_drawing(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert quality.main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert "is not a folder that can be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--count", "0"], "count 0"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--masks-from", "masks"], "belong to --data"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--condition", "nothing", "--count", "1"], "'nothing' is unknown"),
        (["--clip", "nowhere", "--count", "1", "--steps", "1", "--masks", "half"], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys):
    assert quality.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and said in lines[0] and not (tmp_path / "out").exists()


def test_the_committed_report_is_of_200_pictures_or_more():
    folder = results_folder().parent / "cpu" / "quality"
    assert len(read(folder / "pictures.csv")) >= 200
    assert all((folder / name).exists() for name in ("report.md", "sheet.png", "leakage.png", "curves.png"))
