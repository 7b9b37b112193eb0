"""The loop: ids, rows, what is drawn again and what is not."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from runtime.batch.draw import Drawer, draw
from runtime.batch.orders import Ordered
from runtime.batch.requests import Line
from runtime.batch.results import Results
from runtime.serve.options import make_parser
from runtime.serve.orders import heard
from tests.support.server import SMALL, pipe

OPTIONS = make_parser().parse_args([])


def run(bodies, folder, base=None, model="m", **options):
    """Draw bodies; returns what became of each and the rows, by their ids."""
    results = Results(folder)
    lines = [Line(f"r:{i}", base or folder, body) for i, body in enumerate(bodies)]
    with heard(), Drawer(pipe(), OPTIONS) as drawer:
        counts = Counter(draw(lines, drawer, Ordered(pipe().capabilities, model, **options), results))
    results.flush()
    return counts, {row["id"]: row for row in Results(folder).read()}


def test_each_picture_is_the_one_of_its_request_and_is_drawn_once(tmp_path):
    bodies = [{**SMALL, "seed": seed, "steps": steps} for seed, steps in ((1, 2), (2, 3), (3, 2), (1, 2))]
    counts, rows = run(bodies, tmp_path, deterministic=True)
    assert counts == {"drawn": 3, "there": 1} and len(rows) == 3
    for row in rows.values():
        body = next(body for body in bodies if body["seed"] == row["seed"])
        alone = pipe()(**body).images[0]
        with Image.open(tmp_path / row["file"]) as image:
            assert (np.asarray(image) == np.asarray(alone)).all() and image.info["seed"] == str(row["seed"])
        assert (
            row["file"] == f"{row['id'][:2]}/{row['id']}.png" and row["seconds"] > 0 and row["error"] is None
        )
    again, same = run(bodies, tmp_path, deterministic=True)
    assert again == {"there": 4} and same == rows
    (tmp_path / row["file"]).unlink()
    assert run(bodies, tmp_path, deterministic=True)[0]["drawn"] == 1


def test_a_picture_whose_row_was_lost_gets_it_again(tmp_path):
    counts, rows = run([SMALL], tmp_path)
    for file in (tmp_path / "results").iterdir():
        file.unlink()
    counts, found = run([SMALL], tmp_path)
    (row,), (before,) = found.values(), rows.values()
    assert counts == {"there": 1} and row == {**before, "seconds": None}


@pytest.mark.parametrize("left", [0, 2, 100, -1])
def test_a_picture_that_was_cut_short_is_drawn_again(tmp_path, left):
    _, rows = run([SMALL], tmp_path)
    (row,) = rows.values()
    path = tmp_path / row["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    assert run([SMALL], tmp_path)[0] == {"drawn": 1} and path.read_bytes() == whole


def test_a_bad_request_is_a_row_and_not_the_end(tmp_path):
    bad = [
        {"prompt": "a", "steps": 0},
        {"promt": "a"},
        {**SMALL, "regions": [{"mask": "gone.png", "prompt": "b"}]},
    ]
    counts, rows = run([bad[0], SMALL, *bad[1:]], tmp_path)
    assert counts == {"drawn": 1, "refused": 3}
    errors = [row["error"] for row in rows.values() if row["error"]]
    assert (
        len(errors) == 3
        and any("gone.png" in error for error in errors)
        and not any("\n" in error for error in errors)
    )
    assert run([bad[0], SMALL, *bad[1:]], tmp_path)[1] == rows  # and no second row
    mask = Image.new("L", (64, 64), 255)
    mask.save(tmp_path / "gone.png")
    assert run([bad[2]], tmp_path)[0] == {"drawn": 1}  # what was missing has come


def test_the_id_is_of_all_that_makes_the_picture(tmp_path):
    for name, value in (("a", 255), ("b", 255), ("c", 128)):
        Image.new("L", (64, 64), value).save(tmp_path / f"{name}.png")

    def ids(model="m", **changes):
        body = {**SMALL, "regions": [{"mask": "a.png", "prompt": "x"}], **changes}
        return [id for id, _ in Ordered(pipe().capabilities, model).of(Line("", tmp_path, body))]

    first = ids()
    assert (
        ids() == first == ids(regions=[{"mask": "b.png", "prompt": "x"}])
    )  # by what the pictures show, not their names
    assert first == ids(session="s", previews=True)
    others = [
        ids("n"),
        ids(seed=8),
        ids(steps=4),
        ids(regions=[{"mask": "c.png", "prompt": "x"}]),
        ids(prompt="b"),
    ]
    assert len({first[0], *(each[0] for each in others)}) == 6
    assert ids(images=3)[0] == first[0] and len(set(ids(images=3))) == 3
    assert ids(images=3)[1] == ids(seed=8)[0]
    assert ids(seed=None) == ids(seed=None) != first  # one that names no seed has one of its own


def test_a_request_without_a_seed_gives_the_same_picture_again(tmp_path):
    body = {key: value for key, value in SMALL.items() if key != "seed"}
    (first,), (second,) = run([body], tmp_path / "a")[1].values(), run([body], tmp_path / "b")[1].values()
    assert first["seed"] == second["seed"] and first["id"] == second["id"]


def test_a_path_from_elsewhere_is_taken_and_base64_too(tmp_path):
    import base64

    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    text = "data:image/png;base64," + base64.b64encode((tmp_path / "mask.png").read_bytes()).decode()
    bodies = [
        {**SMALL, "regions": [{"mask": mask, "prompt": "x"}]} for mask in (str(tmp_path / "mask.png"), text)
    ]
    counts, rows = run(bodies, tmp_path / "out", base=tmp_path / "elsewhere")
    assert counts == {"drawn": 1, "there": 1} and json.dumps(rows)


@pytest.mark.parametrize("count", [0, -1])
def test_no_picture_is_refused(tmp_path, count):
    assert run([{**SMALL, "images": count}], tmp_path)[0] == {"refused": 1}


@pytest.mark.parametrize(
    "line",
    [
        {**SMALL, "regions": [{"mask": "~nobody-of-this-name/x.png", "prompt": "a"}]},
        {**SMALL, "regions": [{"mask": ".", "prompt": "a"}]},
        {**SMALL, "images": 10**6},
        {**SMALL, "seed": "many"},
        None,
    ],
)
def test_whatever_a_line_says_it_is_that_lines_error(tmp_path, line):
    counts, rows = run([line, SMALL], tmp_path)
    assert counts == {"refused": 1, "drawn": 1} and len(rows) == 2


def test_lists_where_the_pipeline_has_tuples(tmp_path):
    assert run([{**SMALL, "guidance_range": [0.0, 0.5]}], tmp_path)[0] == {"drawn": 1}


def test_two_bad_requests_are_two_rows(tmp_path):
    assert len(run([{"promt": "a"}, {"promt": "a"}], tmp_path)[1]) == 2


def test_what_was_refused_once_and_has_been_drawn_is_one_row(tmp_path):
    body = {**SMALL, "regions": [{"mask": "later.png", "prompt": "b"}]}
    assert run([body], tmp_path)[0] == {"refused": 1}
    Image.new("L", (64, 64), 255).save(tmp_path / "later.png")
    counts, rows = run([body], tmp_path)
    assert counts == {"drawn": 1} and [row["error"] for row in rows.values()] == [None]


def test_a_damaged_picture_is_drawn_again(tmp_path):
    (row,) = run([SMALL], tmp_path)[1].values()
    (tmp_path / row["file"]).write_bytes(b"torn")
    for file in (tmp_path / "results").iterdir():
        file.unlink()
    assert run([SMALL], tmp_path)[0] == {"drawn": 1}


def test_what_is_warned_of_while_a_picture_is_drawn_is_said_of_its_request(tmp_path, capsys):
    Image.new("L", (67, 64)).save(tmp_path / "wide.png")
    run([SMALL, {**SMALL, "image": "wide.png"}], tmp_path)
    said = capsys.readouterr().err.splitlines()
    stretched = "image: 67 x 64 px is stretched to 64 x 64, another aspect ratio"
    assert [line for line in said if "stretched" in line] == [f"warning: r:1: {stretched}"]
