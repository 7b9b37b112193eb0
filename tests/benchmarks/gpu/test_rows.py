"""benchmarks.gpu.rows: rows that survive the run that wrote them."""

import pytest

from benchmarks.gpu.rows import Budget, Table
from runtime.errors import InputError


def test_a_row_is_there_when_it_is_measured_and_known_to_the_next_run(tmp_path):
    table = Table(tmp_path / "new" / "rows.csv", ("p50_ms", "note"))
    table.add("a step", {"p50_ms": 1.5})
    assert (tmp_path / "new" / "rows.csv").read_text().splitlines() == ["case,p50_ms,note", "a step,1.5,"]
    table.add("a picture", {"note": "failed, in two words"})
    again = Table(table.path, ("p50_ms", "note"))
    assert "a step" in again and again.rows["a picture"]["note"] == "failed, in two words"
    assert "another" not in again


def test_what_does_not_fit_is_refused(tmp_path):
    table = Table(tmp_path / "rows.csv", ("p50_ms",))
    with pytest.raises(ValueError, match="no column p5_ms"):
        table.add("a step", {"p5_ms": 1})
    table.add("a step", {})
    with pytest.raises(
        InputError, match="its columns are not those that are written; expected another --out"
    ):
        Table(table.path, ("seconds",))


def test_a_row_of_another_commit_is_measured_again_and_stays_until_then(tmp_path):
    fields = ("p50_ms", "commit")
    old = Table(tmp_path / "rows.csv", fields, {"commit": "aaa"})
    for case in ("a step", "a picture"):
        old.add(case, {"p50_ms": 1, "commit": "aaa"})
    assert "a step" in Table(old.path, fields, {"commit": "aaa"})
    table = Table(old.path, fields, {"commit": "bbb"})
    assert "a step" not in table
    table.add("a step", {"p50_ms": 2, "commit": "bbb"})
    assert old.path.read_text().splitlines() == ["case,p50_ms,commit", "a step,2,bbb", "a picture,1,aaa"]
    again = Table(old.path, fields, {"commit": "bbb"})
    assert "a step" in again and "a picture" not in again


def test_two_processes_keep_each_others_rows(tmp_path):
    now = {"commit": "bbb"}
    Table(tmp_path / "rows.csv", ("p50_ms", "commit")).add("a step", {"p50_ms": 1, "commit": "aaa"})
    one, other = (Table(tmp_path / "rows.csv", ("p50_ms", "commit"), now) for _ in range(2))
    one.add("a step", {"p50_ms": 2, **now})
    other.add("a picture", {"p50_ms": 3, **now})
    assert one.path.read_text().splitlines() == ["case,p50_ms,commit", "a step,2,bbb", "a picture,3,bbb"]
    assert "a step" in other


def test_a_budget_is_spent():
    assert Budget(5).allows(4) and not Budget(5).allows(6) and not Budget(0).allows(0.1)
