"""benchmarks.measure: what every benchmark checks before it measures."""

import importlib

import pytest

MEASURE_LONG = ("launches", "graphs", "export", "static.__main__")


@pytest.mark.parametrize("name", MEASURE_LONG)
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(name, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with which benchmarks.static compiles nothing
    main = importlib.import_module(f"benchmarks.{name}").main
    assert main(["--out", "/dev/null/out/table"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out /dev/null/out") and "/dev/null is not a folder" in said


@pytest.mark.parametrize("name", MEASURE_LONG)
def test_a_mistyped_option_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(["--outt", "out"])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
