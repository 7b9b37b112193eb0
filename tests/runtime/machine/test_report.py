"""The report's facts, and that it is written whole or not at all."""

import subprocess

import pytest
import torch

from runtime.machine import report


def test_versions_device_and_memory_are_known():
    versions = report.versions()
    assert versions["torch"] == torch.__version__
    assert versions["localcontrol"].count(".") == 2
    assert len(report.device_name(torch.device("cpu"))) > 2
    assert 1e7 < report.peak_memory(torch.device("cpu"))["ram"] < 1e12


def test_the_commit_and_whether_the_code_was_changed_since(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "__file__", str(tmp_path / "runtime" / "machine" / "report.py"))
    files = [
        tmp_path / "runtime" / "machine" / "report.py",
        tmp_path / "benchmarks" / "results" / "latency.csv",
    ]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("before")
    assert report.commit() == "unknown"
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    clean = report.commit()
    assert len(clean) >= 7
    files[1].write_text("measured")
    assert report.commit() == clean
    files[0].write_text("after")
    assert report.commit() == f"{clean}-dirty"


@pytest.mark.parametrize(
    ("said", "vendor"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AuthenticAMD"),
        ("processor : 0\nvendor_id : GenuineIntel\nmodel name : Intel(R) Xeon(R)\n", "GenuineIntel"),
        ("CPU implementer : 0x41\n", ""),
    ],
)
def test_the_cpus_maker_is_who_it_says(said, vendor, monkeypatch):
    monkeypatch.setattr(report.Path, "read_text", lambda *_, **__: said)
    monkeypatch.setattr(report.platform, "processor", lambda: "")
    assert report.cpu_vendor() == vendor
