"""The command line of runtime.generate."""

import pytest

from runtime.cli.options import make_parser


@pytest.mark.parametrize("arguments", [[], ["--prompt", "x", "--steps", "many"], ["--prompt", "x", "--what"]])
def test_wrong_options_are_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_parser().parse_args(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
