"""kernels.launching.tuning: sizes that were timed when asked for, kept on disk by device and Triton version."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton

from kernels.launching import tuning

GPU = torch.device("cuda", 0)
DEFAULT = {"BLOCK_P": 32, "BLOCK_C": 64, "num_warps": 4}


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A pretended GPU on which the most warps are fastest; the list of sizes that were timed."""
    seen = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_tables", {})
    monkeypatch.setattr(tuning, "_picked", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (test)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def do_bench(run):
        run()
        return -seen[-1]["num_warps"], seen[-1]["BLOCK_P"]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    return seen


def pick(seen, shape=(4096, 320), default=DEFAULT):
    return tuning.pick("inject", shape, GPU, lambda: default, seen.append)


def test_nothing_is_timed_unless_asked_for(timed, monkeypatch):
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    assert pick(timed) == DEFAULT and not timed
    assert not tuning.table_path(GPU).exists()


def test_tuned_sizes_are_kept_for_the_next_process(timed, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    best = pick(timed)
    assert best == {"BLOCK_P": 16, "BLOCK_C": 64, "num_warps": 8}
    assert timed == tuning.candidates(DEFAULT) and timed[0] == DEFAULT
    monkeypatch.delenv(tuning.VARIABLE)
    monkeypatch.setattr(tuning, "_tables", {})
    monkeypatch.setattr(tuning, "_picked", {})  # another process
    timed.clear()
    assert pick(timed) == best and not timed
    assert pick(timed, shape=(1024, 1280)) == DEFAULT


def test_file_is_named_by_device_and_version(timed):
    assert tuning.table_path(GPU).name == f"nvidia-h200-test-triton-{triton.__version__}.json"


def test_where_a_program_walks_what_it_has_in_flight_is_varied():
    default = {"GROUP": 10, "BLOCK_P": 16, "BLOCK_C": 128, "num_warps": 4, "chunk": 256, "STAGES": 1}
    found = tuning.candidates(default)
    assert found[0] == default and len(found) == 16
    assert {sizes["chunk"] for sizes in found} == {128, 256} and {sizes["STAGES"] for sizes in found} == {
        1,
        3,
    }
    assert all(sizes["GROUP"] == 10 and sizes["BLOCK_C"] == 128 for sizes in found)


def test_two_processes_keep_each_others_sizes(timed, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    pick(timed)
    monkeypatch.setattr(
        tuning, "_tables", {tuning.table_path(GPU): {}}
    )  # one that started before the file was there
    pick(timed, shape=(1024, 1280))
    assert len(json.loads(tuning.table_path(GPU).read_text())) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"inject 4096 320": {"BLOCK_P": -1}}', '{"inject 4096 320": 3}']
)
def test_damaged_file_costs_only_the_tuning(timed, text):
    path = tuning.table_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert pick(timed) == DEFAULT


def test_sizes_of_another_version_of_the_kernel_are_ignored(timed):
    path = tuning.table_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"inject 4096 320": {"BLOCK": 8, "num_warps": 1}}))
    assert pick(timed) == DEFAULT


def test_nothing_is_timed_while_a_graph_is_captured(timed, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick(timed) == DEFAULT and not timed


def test_unwritable_folder_is_no_error(timed, monkeypatch, tmp_path):
    (tmp_path / "localcontrol").write_text("a file where the folder would be")
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert pick(timed)["num_warps"] == 8


def test_who_has_no_home_only_loses_the_tuning(timed, monkeypatch):
    """As a container's user that is a number alone: a kernel runs all the same."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError))
    with pytest.raises(RuntimeError):
        Path.home()
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert pick(timed)["num_warps"] == 8


def test_what_cannot_be_written_leaves_nothing_behind(timed, monkeypatch):
    path = tuning.table_path(GPU)
    path.mkdir(parents=True)  # a folder where the file would be
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert pick(timed)["num_warps"] == 8
    assert list(path.parent.iterdir()) == [path]
