"""export.stages: what a killed build leaves is never taken for whole, and what was whole is not made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.stages import STATE, Stages
from runtime.engines.manifest import NAME, file_entry
from runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"model": "sdxl", "sizes": {"height": "64"}}
COST = {"seconds": 1.5, "peak_bytes": 1000}
KILLED = """
import os
import sys
from pathlib import Path
from export.stages import Stages
from tests.export.test_stages import SETTINGS, make

with Stages(Path(sys.argv[1]), SETTINGS, False) as stages:
    make(stages, "first", "a.txt", "b.txt")
    (stages.work / "half.txt").write_text("ha")
    os._exit(9)
"""


class KilledError(Exception):
    """In place of a signal."""


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "engines"


def make(stages: Stages, name: str, *files: str, data: dict | None = None) -> list[Path]:
    """A stage that writes its name into every file."""
    paths = [stages.work / file for file in files]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    stages.finish(name, data or {}, paths, COST)
    return paths


def killed(folder: Path, *, resume: bool = False) -> Path:
    """A build that stops after its first stage; returns its work folder."""
    with pytest.raises(KilledError), Stages(folder, SETTINGS, resume) as stages:  # noqa: PT012
        make(stages, "first", "a.txt", "sub/b.txt", data={"layers": {"FLOAT": 3}})
        (stages.work / "half.txt").write_text("ha")
        raise KilledError
    return stages.work


def test_a_killed_build_has_no_folder(folder):
    work = killed(folder)
    assert os.listdir(folder.parent) == [work.name]
    assert work.parent == folder.parent  # the same file system
    assert not (work / NAME).exists()


def test_a_resumed_build_finds_what_is_whole(folder):
    work = killed(folder)
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.work == work
        assert stages.done("first") == {"layers": {"FLOAT": 3}}
        assert stages.done("second") is None
        assert set(stages.files()) == {"a.txt", "sub/b.txt"}
        make(stages, "second", "c.txt")
        assert stages.done("second") == {}
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.done("first") is not None and stages.done("second") is not None


def test_after_a_process_that_was_killed(folder):
    code = subprocess.run([sys.executable, "-c", KILLED, folder], cwd=ROOT, timeout=60).returncode
    assert code == 9
    assert not folder.exists()
    with Stages(folder, SETTINGS, resume=True) as stages:  # its lock went with it
        assert stages.done("first") == {}


HARM = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_text("firs"),
    "longer": lambda path: path.write_text("first!"),
    "edited": lambda path: path.write_text("First"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_stage_whose_file_was_changed_is_made_again(folder, harm):
    work = killed(folder)
    HARM[harm](work / "sub" / "b.txt")
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.done("first") is None


def test_a_change_is_found_in_the_build_itself(folder):
    with Stages(folder, SETTINGS, resume=False) as stages:
        path, _ = make(stages, "first", "a.txt", "b.txt")
        assert stages.done("first") == {}
        path.write_text("fi")
        assert stages.done("first") is None


def test_a_stage_of_no_files(folder):
    with Stages(folder, SETTINGS, resume=False) as stages:
        make(stages, "plan", data={"specs": ["unet"]})
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.done("plan") == {"specs": ["unet"]}


def test_a_stage_that_is_made_again_takes_the_place_of_the_old(folder):
    killed(folder)
    with Stages(folder, SETTINGS, resume=True) as stages:
        make(stages, "first", "other.txt")
        assert set(stages.files()) == {"other.txt"}


def test_files_and_costs(folder):
    with Stages(folder, SETTINGS, resume=False) as stages:
        first, second = make(stages, "first", "a.txt", "b.txt")
        make(stages, "second")
        assert stages.files() == {"a.txt": file_entry(first), "b.txt": file_entry(second)}
        assert stages.costs() == {"first": {**COST, "bytes": 10}, "second": {**COST, "bytes": 0}}


def test_without_resume_what_was_left_is_cleared(folder):
    work = killed(folder)
    with Stages(folder, SETTINGS, resume=False) as stages:
        assert stages.done("first") is None
        assert os.listdir(work) == ["lock"]
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.done("first") is None


@pytest.mark.parametrize("resume", [True, False])
def test_a_first_build(folder, resume):
    with Stages(folder, SETTINGS, resume) as stages:
        assert stages.done("first") is None
        assert stages.files() == {} and stages.costs() == {}


@pytest.mark.parametrize("settings", [{"model": "other"}, {}, {**SETTINGS, "refit": True}], ids=str)
def test_a_build_of_other_settings_is_not_resumed(folder, settings):
    work = killed(folder)
    before = {path.name for path in work.iterdir()}
    with pytest.raises(InputError, match=f"--resume: {work} is of a build with other options"):
        Stages(folder, settings, resume=True).__enter__()
    assert {path.name for path in work.iterdir()} == before
    with Stages(folder, dict(reversed(SETTINGS.items())), resume=True) as stages:  # their order is the same
        assert stages.done("first") is not None


def test_after_a_refusal_the_work_folder_is_free(folder):
    killed(folder)
    other = Stages(folder, {"model": "other"}, resume=True)
    with pytest.raises(InputError, match="other options"):
        other.__enter__()
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.done("first") is not None


@pytest.mark.parametrize(
    "text",
    ["", '{"settings": "', "[]", "null", '"stages"', "{}", '{"stages": {}}'],
    ids=["empty", "cut", "a list", "null", "text", "an empty object", "no settings"],
)
def test_a_state_that_cannot_be_read_is_no_state(folder, text):
    work = killed(folder)
    (work / STATE).write_text(text)
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.done("first") is None


@pytest.mark.parametrize("resume", [True, False])
def test_two_builds_of_one_folder_at_a_time(folder, resume):
    with Stages(folder, SETTINGS, resume=False) as stages:
        make(stages, "first", "a.txt")
        with pytest.raises(InputError, match=f"--out: another build is writing {stages.work}"):
            Stages(folder, SETTINGS, resume).__enter__()
        assert stages.done("first") == {}
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.done("first") == {}


def test_two_builds_of_two_folders(folder):
    with Stages(folder, SETTINGS, resume=False), Stages(folder.with_name("b"), SETTINGS, resume=False):
        pass


@pytest.mark.parametrize("parent", ["missing", "a file"])
def test_where_nothing_can_be_written(tmp_path, parent):
    if parent == "a file":
        (tmp_path / "engines").write_text("")
    with pytest.raises(InputError, match=r"--out: cannot write .*\.unet\.part"):
        Stages(tmp_path / "engines" / "unet", SETTINGS, resume=False).__enter__()


def publish(folder: Path, *keep: str, resume: bool = False) -> None:
    with Stages(folder, SETTINGS, resume) as stages:
        make(stages, "first", "engines/a.txt", "model/b.txt", "onnx/c.txt")
        (stages.work / NAME).write_text("{}")
        stages.publish(folder, list(keep))


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_published_is_what_was_listed_and_the_manifest(folder):
    publish(folder, "engines/a.txt", "model/b.txt")
    assert listed(folder) == {"engines", "engines/a.txt", "model", "model/b.txt", NAME}
    assert (folder / "engines" / "a.txt").read_text() == "first"
    assert os.listdir(folder.parent) == ["engines"]


def test_published_in_place_of_another(folder):
    (folder / "onnx").mkdir(parents=True)
    (folder / "old.txt").write_text("old")
    publish(folder, "engines/a.txt")
    assert listed(folder) == {"engines", "engines/a.txt", NAME}
    assert os.listdir(folder.parent) == ["engines"]


def test_nothing_is_resumed_of_a_build_that_was_published(folder):
    publish(folder, "engines/a.txt")
    with Stages(folder, SETTINGS, resume=True) as stages:
        assert stages.done("first") is None
    assert (folder / "engines" / "a.txt").exists()


def test_leftovers_of_another_stage_are_not_published(folder):
    killed(folder)
    publish(folder, "engines/a.txt", resume=True)
    assert listed(folder) == {"engines", "engines/a.txt", NAME}


@pytest.mark.parametrize("whole", [True, False], ids=["with a folder", "without"])
def test_published_after_one_that_was_killed_while_it_took_the_name(folder, whole):
    """The old folder was already moved away, or not all of it deleted."""
    old = folder.with_name(f".{folder.name}.part.old")
    old.mkdir()
    (old / "old.txt").write_text("old")
    if whole:
        folder.mkdir()
        (folder / "older.txt").write_text("older")
    publish(folder, "engines/a.txt")
    assert listed(folder) == {"engines", "engines/a.txt", NAME}
    assert os.listdir(folder.parent) == ["engines"]


def test_a_link_keeps_pointing_at_its_target(tmp_path):
    (tmp_path / "disk" / "target").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    publish(tmp_path / "link", "engines/a.txt")
    assert (tmp_path / "link").is_symlink()
    assert listed(tmp_path / "disk" / "target") == {"engines", "engines/a.txt", NAME}
    assert os.listdir(tmp_path / "disk") == ["target"]
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_the_state_names_files_from_the_work_folder(folder):
    """So that the folder can be moved."""
    work = killed(folder)
    state = json.loads((work / STATE).read_text())
    assert set(state["stages"]["first"]["files"]) == {"a.txt", "sub/b.txt"}
    moved = folder.parent / "elsewhere"
    moved.mkdir()
    work.rename(moved / work.name)
    with Stages(moved / folder.name, SETTINGS, resume=True) as stages:
        assert stages.done("first") is not None


def test_the_working_folder_itself(folder, monkeypatch):
    folder.mkdir()
    monkeypatch.chdir(folder)
    publish(Path("."), "engines/a.txt")
    assert listed(folder) == {"engines", "engines/a.txt", NAME}


def test_a_folder_of_that_name_that_is_not_a_builds_is_left_alone(folder, tmp_path):
    theirs = tmp_path / ".engines.part"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(InputError, match="is not of a build, and would be emptied"),
        Stages(folder, SETTINGS, False),
    ):
        pass
    assert (theirs / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_a_link_of_that_name_is_refused(folder, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / ".engines.part").symlink_to(tmp_path / "home")
    with pytest.raises(InputError, match="is not a build's folder"), Stages(folder, SETTINGS, True):
        pass
    assert (tmp_path / "home" / "thesis.txt").exists()
