"""The two-minute part of the campaign: `make fuzz` is the whole of it."""

import resource

import pytest

from runtime.errors import InputError
from tests.fuzz import campaign
from tests.fuzz.campaign import MOST_BYTES, run
from tests.fuzz.targets import TARGETS

COUNT = 2000  # of all targets together
SEED = 1
WHOLE = sum(share for share, _ in TARGETS.values())


@pytest.mark.parametrize("name", TARGETS)
def test_what_strangers_give_is_read_or_refused_in_one_line(name, tmp_path):
    share, make = TARGETS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = run(name, make, round(COUNT * share / WHOLE), SEED, tmp_path)
    assert not outcome.failures, "\n\n".join(outcome.failures[:5])
    assert outcome.read and outcome.refused, outcome  # inputs that are all refused test nothing
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def call(what):
    return lambda rng, folder: what


def raises(error):
    def work():
        raise error

    return work


def hangs():
    while True:
        pass


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (raises(KeyError("x")), "KeyError"),
        (raises(InputError("")), "not one line"),
        (hangs, "hung"),
        (lambda: __import__("os").system("true"), "os.system"),
        (lambda: __import__("subprocess").run(["true"], check=False), "subprocess.Popen"),
        (lambda: __import__("socket").create_connection(("127.0.0.1", 9), 1), "socket.connect"),
    ],
    ids=["foreign", "empty", "hung", "shell", "process", "host"],
)
def test_the_campaign_finds_what_it_looks_for(work, said, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "MOST_SECONDS", 0.2)
    outcome = run("x", call(work), 1, 0, tmp_path)
    assert len(outcome.failures) == 1 and said in outcome.failures[0]


def test_an_input_is_made_again_by_its_number(tmp_path):
    for name, (_, make) in TARGETS.items():
        seen = []
        for _ in range(2):
            folder = tmp_path / "x"
            folder.mkdir()
            make(campaign.generator(name, 3, 5), folder)
            seen.append({p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
            campaign.shutil.rmtree(folder)
        assert seen[0] == seen[1], name
