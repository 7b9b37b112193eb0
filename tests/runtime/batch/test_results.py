"""The folder of results: one run at a time, nothing half-written, rows that can be read."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from runtime.batch.results import Results, Row, opened
from runtime.errors import InputError

PNG = "ab" + "0" * 62


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "results").mkdir()
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "results" / "a.parquet")
    with pytest.raises(InputError, match="expected another OUT"):
        Results(tmp_path)


def test_a_source_that_is_no_text_is_written(tmp_path):
    results = Results(tmp_path)
    results.add(Row("a", None, None, None, "bad \udcff", "b\udcff"))
    results.flush()
    assert Results(tmp_path).read()[0]["source"] == "b?"


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with opened(tmp_path), pytest.raises(InputError, match=r"^OUT .*: in use \(process"), opened(tmp_path):
        pass
    with opened(tmp_path):
        pass


def test_what_a_killed_run_left_half_written_goes_and_nothing_else(tmp_path):
    with opened(tmp_path) as results:
        results.save(PNG, b"png", 1, 0.5, "a")
    left = [tmp_path / folder / ".0123abcd-77-00.png.part" for folder in ("ab", "cd", "results")]
    mine = [tmp_path / "notes" / ".mine.part", tmp_path / "ab" / "notes.part"]
    for path in left + mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    with opened(tmp_path) as results:
        assert not any(path.exists() for path in left) and all(path.exists() for path in mine)
        assert results.path(PNG).read_bytes() == b"png" and len(results.read()) == 1


def test_rows_are_on_the_disk_however_a_run_ends(tmp_path):
    def run():
        with opened(tmp_path) as results:
            results.add(Row("a", None, None, None, "bad", "b"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [row["id"] for row in Results(tmp_path).read()] == ["a"]
