"""--preset: what it sets, and that any option overrides it."""

import pytest

from runtime.cli.options import make_parser, parse
from runtime.cli.presets import PRESETS
from runtime.sampling.request import Request


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_request(name):
    options = parse(["--prompt", "x", "--preset", name])
    assert {key: getattr(options, key) for key in PRESETS[name]} == PRESETS[name]
    request = Request("x", steps=options.steps, guidance=options.guidance, scheduler=options.scheduler)
    assert request.steps == PRESETS[name]["steps"]


def test_options_override_wherever_they_stand():
    for given in (["--steps", "6", "--preset", "lcm4"], ["--preset", "lcm4", "--steps", "6"]):
        options = parse(["--prompt", "x", *given])
        assert (options.steps, options.scheduler, options.guidance) == (6, "lcm", 1.0)


def test_an_option_that_is_given_as_its_default_overrides_too():
    options = parse(["--prompt", "x", "--preset", "turbo1", "--steps", "30"])
    assert (options.steps, options.scheduler) == (30, "euler_a_trailing")


def test_without_one_nothing_is_set():
    assert parse(["--prompt", "x"]) == make_parser().parse_args(["--prompt", "x"])


def test_an_unknown_one_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--prompt", "x", "--preset", "lcm8"])
    assert caught.value.code == 2 and "invalid choice: 'lcm8'" in capsys.readouterr().err
