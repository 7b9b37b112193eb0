"""runtime.engines.verified: engines are used without a word only where they were found to compute what torch does."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from runtime.engines import verified
from runtime.engines.manifest import read_manifest, write_manifest
from runtime.engines.parts import load_engines
from runtime.errors import InputError
from tests.support import engines

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    path = engines.copy_folder("onnxruntime", tmp_path)
    (path / verified.FILE).unlink()
    return path


def check(folder):
    verified.check_verified(read_manifest(folder), folder, CPU)


def note(folder, passed, **outcome):
    verified.note(read_manifest(folder), folder, CPU, outcome, passed)


def silent(run, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*arguments)


def test_never_compared_is_one_line(folder):
    with pytest.warns(
        UserWarning, match=r"not yet compared with torch on .*python -m export\.verify"
    ) as said:
        load_engines(folder, CPU)
    assert len(said) == 1 and "\n" not in str(said[0].message)


def test_compared_and_right_is_silent(folder):
    note(folder, True)
    silent(check, folder)


def test_compared_and_wrong_is_refused_until_it_is_right(folder):
    note(folder, False, worst="unet prediction: relative RMS 4.4e-03, at most 1e-04")
    with pytest.raises(InputError, match=r"computes something else than torch on .*4\.4e-03.*rebuild it: "):
        load_engines(folder, CPU)
    note(folder, True)
    silent(check, folder)
    assert len(verified.entries(folder)) == 1  # in place of the other


@pytest.mark.parametrize("change", ["device", "versions", "manifest"])
def test_another_machine_version_or_build_is_not_what_was_compared(folder, change):
    note(folder, True)
    data = json.loads((folder / verified.FILE).read_text())
    data["machines"][0][change] = {"onnxruntime": "1.0"} if change == "versions" else "another"
    (folder / verified.FILE).write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="not yet compared"):
        check(folder)
    note(folder, True)
    assert len(verified.entries(folder)) == 2  # that of the other machine is kept


def test_a_rebuilt_folder_is_compared_again(folder):
    note(folder, True)
    write_manifest(replace(read_manifest(folder), date="2000-01-01"), folder)
    with pytest.warns(UserWarning, match="not yet compared"):
        check(folder)


def test_other_instructions_are_another_machine(folder, monkeypatch):
    note(folder, True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    with pytest.warns(UserWarning, match="on .*, AVX1024"):
        check(folder)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '{"machines": 3}', '{"machines": [7]}', "{}"])
def test_a_damaged_note_is_none(folder, text):
    (folder / verified.FILE).write_text(text)
    with pytest.warns(UserWarning, match="not yet compared"):
        check(folder)
