"""runtime.serve.admission: how many rows a step has room for."""

from runtime import LocalControlPipeline
from runtime.serve.admission import ROWS, most_rows
from tests.support.server import pipe


def test_rows_of_this_machine():
    assert most_rows(pipe()) == ROWS
    compiled = LocalControlPipeline(pipe().model, pipe().adapters).compile(compiler=None)
    assert most_rows(compiled) == ROWS
