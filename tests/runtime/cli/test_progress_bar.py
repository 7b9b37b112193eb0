"""export.progress: a bar while a stage runs, where someone looks on, and one line when it has ended."""

import io
import re
import sys
import time
from functools import partial

import pytest
from tqdm import tqdm

from export import progress
from export.progress import stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def look_on(monkeypatch):
    """Have a terminal for stderr, where every step is drawn; pytest gives it back after the fixtures."""
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, mininterval=0, miniters=1))

    def call() -> Terminal:
        monkeypatch.setattr("sys.stderr", Terminal())
        return sys.stderr

    return call


def drawings(terminal: Terminal) -> list[str]:
    return [line.strip() for line in terminal.getvalue().split("\r") if line.strip()]


def run(name: str, *reports: tuple) -> tuple[list[str], dict]:
    """What a stage says, and its cost."""
    said: list[str] = []
    with stage(name, said.append) as (report, cost):
        for given in reports:
            report(*given)
    return said, cost


def test_a_stage_says_one_line_with_its_time():
    said, cost = run("export unet")
    assert len(said) == 1
    assert re.match(rf"export unet +{cost['seconds']:.1f} s", said[0])
    assert 0 <= cost["seconds"] < 5


def test_the_cost_is_of_the_stage_alone():
    said = []
    with stage("first", said.append) as (_, first):
        held = bytearray(b"x" * 2**26)
        time.sleep(0.05)
        del held
    with stage("second", said.append) as (_, second):
        assert second == {}  # known when it has ended
    assert first["seconds"] >= 0.05 > second["seconds"]
    if "peak_bytes" in first:  # the kernel of a container may refuse
        assert first["peak_bytes"] - second["peak_bytes"] > 2**25
        assert "peak" in said[0]


def test_nothing_is_drawn_where_nobody_looks_on(capsys):
    run("compile", (1, 2), ("tactics", 2, 2))
    assert capsys.readouterr().err == ""


def test_steps_are_drawn(look_on):
    terminal = look_on()
    run("export unet", *((i, 40) for i in range(1, 41)))
    drawn = drawings(terminal)
    assert drawn[0].startswith("export unet")
    assert any("20/40" in line for line in drawn)
    assert any("40/40" in line for line in drawn)
    assert terminal.getvalue().endswith("\r")  # and wiped away


def test_another_phase_counts_anew(look_on):
    terminal = look_on()
    run("compile", ("parse", 3, 3), ("tactics", 1, 9), ("tactics", 9, 9), ("write", 1, 9))
    drawn = drawings(terminal)
    for step, phase in (("3/3", "parse"), ("1/9", "tactics"), ("9/9", "tactics"), ("1/9", "write")):
        assert any(f" {step} " in line and phase in line for line in drawn), (step, phase, drawn)
    assert not any("12/" in line or "10/" in line for line in drawn)


@pytest.mark.parametrize("total", [None, 0], ids=["unknown", "zero"])
@pytest.mark.parametrize("where", ["terminal", "file"])
def test_a_number_of_steps_that_is_not_known(look_on, where, total):
    if where == "terminal":
        look_on()
    said, _ = run("compile", (0, total), ("tactics", 1, total), ("tactics", 500, total), (2, 3), (3, total))
    assert len(said) == 1


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_a_stage_that_fails_says_nothing_and_passes_it_on(look_on, failure):
    terminal, said = look_on(), []

    def fail():
        with stage("compile", said.append) as (report, _):
            report(1, 3)
            raise failure

    with pytest.raises(failure):
        fail()
    assert said == []
    assert terminal.getvalue().endswith("\r")
