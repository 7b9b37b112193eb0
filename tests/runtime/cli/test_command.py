"""runtime.cli.command: exit codes, one line for bad input, the shared options."""

import gc
import os
import signal
import sys
import time

import pytest

from runtime.cli import interrupt
from runtime.cli.command import CANCELLED, Parser, add_model_sources, exit_code, quick_imports
from runtime.errors import InputError


def failing(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_what_the_work_returns_is_the_code(returned, code, capsys):
    assert exit_code(lambda: returned) == code and capsys.readouterr() == ("", "")


def test_bad_input_is_one_line_and_code_2(capsys):
    assert exit_code(failing(InputError("mask: missing"))) == 2
    assert capsys.readouterr() == ("", "error: mask: missing\n")


def test_an_interrupt_says_what_it_is_told_to(capsys):
    assert exit_code(failing(KeyboardInterrupt()), "run it again") == CANCELLED == 130
    assert capsys.readouterr().err == "run it again\n"


@pytest.mark.parametrize("error", [InputError("no such package"), RecursionError("x")])
def test_what_a_swallowed_interrupt_leads_to_is_an_interrupt(error, capsys):
    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise error from None

    before = signal.signal(signal.SIGINT, interrupt._note)
    try:
        assert exit_code(work) == CANCELLED and exit_code(lambda: 0) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


def test_what_is_a_defect_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)


def test_an_unknown_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        Parser(prog="python -m here").parse_args(["--nothing"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nothing (see python -m here --help)\n"


@pytest.mark.parametrize("loaded", [False, True], ids=["in a fresh process", "diffusers loaded"])
def test_garbage_is_not_looked_for_in_the_first_imports(loaded, monkeypatch):
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, "diffusers", gc)
    frozen = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled() is loaded
    assert gc.isenabled() and (gc.get_freeze_count() > frozen) is not loaded
    gc.unfreeze()


def test_model_sources_are_the_same_everywhere():
    from export.build_engine import make_parser as builder
    from runtime.cli.options import make_parser as generator

    own = Parser()
    add_model_sources(own)
    shared = {
        action.dest: (action.option_strings, action.help) for action in own._actions if action.dest != "help"
    }
    for parser in (builder(), generator()):
        theirs = {action.dest: (action.option_strings, action.help) for action in parser._actions}
        assert shared.items() <= theirs.items()
    assert "a ControlNet, which engines do not take" in shared["adapter"][1]  # the builder's help has it too
