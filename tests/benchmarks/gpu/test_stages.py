"""benchmarks.gpu: what fails is a row, what there is no time for is left out, and unknown stages are refused."""

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.device import ON_GPU, capture, time_calls
from benchmarks.gpu.ours import COLUMNS, Recorder
from benchmarks.gpu.rows import Budget, Table
from benchmarks.gpu.stages import GROUPS, ORDER, run_group


def test_every_stage_is_in_one_group():
    assert sorted(stage for group in GROUPS for stage in group.stages) == sorted(ORDER)


def test_a_failure_is_a_row_that_names_it_and_the_next_case_goes_on(tmp_path):
    recorder = Recorder(tmp_path, Budget(100))

    def fails():
        raise RuntimeError("no memory\nat all")

    assert not recorder.measure("one", fails)
    assert recorder.measure("two", lambda: {"p50_ms": 3})
    rows = Recorder(tmp_path, Budget(100)).table.rows
    assert rows["one"]["note"] == "RuntimeError: no memory" and rows["two"]["p50_ms"] == "3"
    assert rows["two"]["device"] and rows["two"]["torch"]


def test_what_there_is_no_time_for_is_left_out_and_what_is_there_is_kept(tmp_path, capsys):
    assert Recorder(tmp_path, Budget(100)).measure("one", lambda: {})
    late = Recorder(tmp_path, Budget(0))
    assert late.measure("one", lambda: pytest.fail("it is there")) and not late.measure("two", lambda: {})
    assert "two: skipped" in capsys.readouterr().out and "two" not in late.table


def test_unknown_stages_are_refused(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path), "--stages", "step,pictures"]) == 2
    assert "stages pictures: unknown; expected tests,kernels,step" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stages.csv", "kernels.csv"])
def test_a_table_of_another_version_is_refused_before_anything_runs(name, tmp_path, capsys):
    (tmp_path / name).write_text("case,seconds\na step,1\n")
    assert command.main(["--out", str(tmp_path), "--stages", "vae", "--small"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {tmp_path / name}: its columns are not") and not said.out


def test_what_another_commit_measured_is_measured_again(tmp_path, monkeypatch):
    with monkeypatch.context() as then:
        then.setattr("benchmarks.measure.commit", lambda: "aaa")
        Recorder(tmp_path, Budget(100)).measure("one", lambda: {"p50_ms": 1})
    assert Recorder(tmp_path, Budget(100)).measure("one", lambda: {"p50_ms": 2})
    assert Table(tmp_path / "stages.csv", COLUMNS).rows["one"]["p50_ms"] == "2"


@pytest.mark.skipif(ON_GPU, reason="of a CPU")
def test_calls_on_a_cpu_are_timed_once():
    calls = []
    together, note = capture([lambda: calls.append(1), lambda: calls.append(2)])
    times = time_calls(together)
    assert not note and calls[:2] == [1, 2] and times["p20_ms"] == times["p80_ms"] > 0


@pytest.mark.skipif(ON_GPU, reason="of a CPU")
@pytest.mark.parametrize(
    "stages",
    [list(group.stages) for group in GROUPS if group.stages[0] not in ("tests", "kernels", "tuning")],
    ids=",".join,
)
def test_every_case_runs_with_a_small_model(stages, tmp_path):
    run_group(stages, tmp_path, 600, small=True)
    rows = Table(tmp_path / "stages.csv", COLUMNS).rows
    assert {row["stage"] for row in rows.values()} >= set(stages) - {"batch", "peers", "fp8", "offload"}
    assert rows and not [row for row in rows.values() if row["note"]]
