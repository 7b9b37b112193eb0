"""Requests from lines, tables and folders; what cannot be read is that line's error."""

import json
from datetime import datetime
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from runtime.batch.requests import read
from runtime.errors import InputError
from tests.support.refusals import refusal


def test_json_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n\nnot json\n[1]\n{"prompt": "ä", "seed": 3}\n', "utf-8")
    count, lines = read(file)
    found = list(lines())
    assert count == len(found) == 4
    assert [line.body for line in found] == [{"prompt": "a"}, None, None, {"prompt": "ä", "seed": 3}]
    assert found[1].error.startswith("a.jsonl:3: not JSON") and "\n" not in found[1].error
    assert found[2].error.startswith("a.jsonl:4: list") and found[3].source == "a.jsonl:5"
    assert all(line.base == tmp_path for line in found)


def test_a_field_that_is_given_twice_is_that_requests_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "seed": 1, "seed": 2}\n{"prompt": "b"}\n')
    first, second = read(tmp_path / "a.jsonl")[1]()
    assert first.error == "a.jsonl:1: not JSON: 'seed' is given twice in an object; expected it once"
    assert second.body == {"prompt": "b"}


def test_a_table_without_its_empty_cells(tmp_path):
    rows = [
        {"prompt": "a", "seed": None, "regions": [{"mask": "m.png", "prompt": "b", "scale": None}]},
        {"prompt": "c", "seed": 5, "regions": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    count, lines = read(tmp_path / "a.parquet")
    assert count == 2
    assert [line.body for line in lines()] == [
        {"prompt": "a", "regions": [{"mask": "m.png", "prompt": "b"}]},
        {"prompt": "c", "seed": 5},
    ]


def test_a_project_that_cannot_be_read_is_its_requests_error(tmp_path, monkeypatch):
    for name, text in (("regions.json", "[{}]"), ("project.json", '{"settings": {}}')):
        (tmp_path / name).write_text(text)
    read_bytes = type(tmp_path).read_bytes

    def unreadable(path):
        if path.name == "project.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(type(tmp_path), "read_bytes", unreadable)
    (line,) = read(tmp_path)[1]()
    assert line.body is None and "project.json: " in line.error and "Permission denied" in line.error


def test_a_cell_that_no_request_has_is_its_rows_error(tmp_path):
    """Bytes, dates, decimals: the other rows are drawn."""
    cells = (b"\x89PNG", datetime(2020, 1, 1), Decimal("1.5"), {"list": [b"x"]})
    for cell in cells:
        table = pa.Table.from_pylist([{"prompt": "a", "image": cell}, {"prompt": "b", "image": None}])
        parquet.write_table(table, tmp_path / "a.parquet")
        bad, good = read(tmp_path / "a.parquet")[1]()
        assert bad.body is None and bad.error.startswith("a.parquet:0: image: ") and "\n" not in bad.error
        assert good.body == {"prompt": "b"}


def test_a_table_that_is_damaged_within_is_refused_where_it_is(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"prompt": ["a red star"] * 100}), file, use_dictionary=False)
    data = bytearray(file.read_bytes())
    data[4:60] = bytes(255 - byte for byte in data[4:60])
    file.write_bytes(data)
    count, rows = read(file)
    assert count == 100 and refusal(list, rows()).startswith(f"{file}: damaged after row 0: ")


def test_a_folder_of_requests_and_of_projects(tmp_path):
    regions = [{"mask": "mask-1.png", "prompt": "b"}]
    settings = {
        "prompt": "p",
        "negative_prompt": "",
        "seed": 4,
        "steps": 6,
        "held": True,
        "scheduler": "",
        "width": 64,
        "height": 64,
    }
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "regions.json").write_text(json.dumps({"prompt": "a", "regions": regions}))
    (tmp_path / "three" / "regions.json").write_text(json.dumps(regions))
    (tmp_path / "two" / "regions.json").write_text(json.dumps(regions))
    (tmp_path / "two" / "project.json").write_text(json.dumps({"settings": settings}))
    count, lines = read(tmp_path)
    one, three, two = lines()
    assert count == 3 and one.body == {"prompt": "a", "regions": regions} and one.base == tmp_path / "one"
    assert three.body is None and "regions alone" in three.error
    assert two.body == {
        "prompt": "p",
        "height": 64,
        "width": 64,
        "steps": 6,
        "seed": 4,
        "outside": "held",
        "regions": regions,
    }


@pytest.mark.parametrize(
    ("name", "data"), [("a.csv", b""), ("a.parquet", b"PAR1 not"), ("none.jsonl", None), ("empty", None)]
)
def test_what_is_no_such_file_is_refused(tmp_path, name, data):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    elif name == "empty":
        path.mkdir()
    with pytest.raises(InputError, match="expected JSON lines") as error:
        read(path)
    assert (
        "\n" not in str(error.value) and str(error.value).count(name) == 1 and "Errno" not in str(error.value)
    )


def test_what_is_nested_too_deeply_or_a_folder_or_a_project_without_settings_is_that_lines_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "regions.json").mkdir()
    (tmp_path / "two" / "regions.json").write_text("[]")
    (tmp_path / "two" / "project.json").write_text('{"settings": null}')
    found = [*read(tmp_path / "a.jsonl")[1](), *read(tmp_path)[1]()]
    assert [line.body for line in found] == [None] * 3 and all(
        line.error and "\n" not in line.error for line in found
    )


def test_a_table_of_pandas_has_floats_for_its_gaps(tmp_path):
    parquet.write_table(
        pa.table({"prompt": ["a", "b"], "seed": [3.0, float("nan")], "guidance": [2.5, 4.0]}),
        tmp_path / "a.parquet",
    )
    assert [line.body for line in read(tmp_path / "a.parquet")[1]()] == [
        {"prompt": "a", "seed": 3, "guidance": 2.5},
        {"prompt": "b", "guidance": 4},
    ]
