"""benchmarks.serving on a tiny model: one load for all, baselines batch what they should, pictures are checked."""

import csv
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import serving, serving_load
from benchmarks.serving_load import closed, make_limits, make_orders, opened, running
from benchmarks.serving_policies import Notes, make_policies
from runtime.serve.work import Work
from tests.support import saved_model
from tests.support.server import pipe, wait_until
from tests.support.tiny import make_adapter

POLICIES = ["one by one", "batches of alike", "shared steps"]


@pytest.fixture(scope="module")
def orders():
    """Eight requests, of 1 to 4 steps so that they are quick."""
    found = make_orders(pipe(), 8)
    for order in found:
        order.request.steps = (order.request.steps + 7) // 8
    return found


def policy_of(name, notes, rows=16, window=0.05):
    return make_policies(pipe(), make_limits(rows, 100), window)[name](notes)


def driven(name, orders, drive=lambda *given: closed(*given, clients=5), **options):
    notes = Notes()
    with running(policy_of(name, notes, **options)) as policy:
        drive(policy, notes, orders)
    return notes


def test_writes_a_row_for_each_load_and_policy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serving_load, "STEPS", (2, 3))
    make_adapter().save_pretrained(tmp_path / "adapter")
    model = ["--model", str(saved_model.folder()), "--adapter", str(tmp_path / "adapter"), "--dtype", "fp32"]
    more = ["--clients", "2", "--requests", "3", "--out", str(tmp_path)]
    assert serving.main(["--quick", *model, *more]) == 0
    rows = list(csv.DictReader((tmp_path / "serving.csv").open()))
    loads = [("closed", "2", ""), ("open", "", "1.5")]
    assert [(row["loop"], row["clients"], row["rate"]) for row in rows] == [
        x for x in loads for _ in POLICIES
    ]
    assert [row["policy"] for row in rows] == POLICIES * 2
    for row in rows:
        assert 0 < float(row["first_p50_ms"]) <= float(row["p50_ms"]) <= float(row["p95_ms"])
        assert float(row["steps_per_s"]) > float(row["images_per_s"]) > 0 and float(row["rows_per_tick"]) >= 1
        assert all(row[key] for key in ("device", "threads", "torch", "commit", "date", "most_rows", "size"))
    said = capsys.readouterr().out
    assert "shared steps / one by one, images/s, closed loop: 2 clients" in said
    assert "shared steps / batches of alike, p95 of short requests, open loop: 1.5 of capacity" in said
    assert min(Image.open(tmp_path / "serving.png").size) > 100


def test_the_load_is_mixed_and_always_the_same():
    first, second = (make_orders(pipe(), 40) for _ in range(2))
    assert [order.body for order in first] == [order.body for order in second]
    requests = [order.request for order in first]
    assert {request.steps for request in requests} == {4, 8, 15, 30}
    assert {request.guidance for request in requests} == {1.0, 5.0}
    assert {len(request.regions) for request in requests} == {0, 1}
    masks = [request.regions[0].mask for request in requests if request.regions]
    assert all(0 < mask.mean() < 1 for mask in masks) and not torch.equal(*masks[:2])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("drive", [closed, opened])
def test_every_request_is_drawn_as_alone(name, drive, orders):
    options = {"clients": 5} if drive is closed else {"rate": 200.0, "seed": 0}
    notes = driven(name, orders, lambda *given: drive(*given, **options))
    assert len(notes.ends) == len(notes.first) == len(orders)
    for work, end in notes.ends.items():
        assert work.created < notes.first[work] <= end
    assert sum(notes.rows) == sum(work.rows * work.order.request.steps for work in notes.ends)
    alone = {order.request.seed: pipe().draw(order.request) for order in orders[::3]}
    serving.compare(alone, 1e-4, name, notes)


def test_only_alike_requests_make_a_batch(orders):
    notes = Notes()
    policy = policy_of("batches of alike", notes, rows=4, window=10)
    kinds = [(order.request.steps, order.request.guidance) for order in orders]
    guided = next(kind for kind in kinds if kind[1] > 1 and kinds.count(kind) >= 2)
    alike = [order for order, kind in zip(orders, kinds, strict=True) if kind == guided][:2]
    others = [order for order, kind in zip(orders, kinds, strict=True) if kind != guided]
    with running(policy):
        policy.submit(Work(others[0], ""))  # it waits for others of its kind, and these do not wait for it
        for order in alike:
            policy.submit(Work(order, ""))
        wait_until(lambda: len(notes.ends) == 2)
    assert {work.order.request.seed for work in notes.ends} == {order.request.seed for order in alike}
    assert notes.rows == [4] * guided[0]


def test_a_batch_waits_for_its_window(orders):
    start = time.monotonic()
    driven("batches of alike", orders[:1], window=0.3)
    assert time.monotonic() - start >= 0.3


def test_another_picture_is_an_error(orders):
    notes = driven("one by one", orders[:2])
    wrong = SimpleNamespace(
        latents=pipe().draw(orders[0].request).latents + 0.1, images=[Image.new("RGB", (64, 64))]
    )
    with pytest.raises(RuntimeError, match="shared steps: request 0 is not what it is alone: latents off by"):
        serving.compare({0: wrong}, 1e-4, "shared steps", notes)


@pytest.mark.parametrize("name", POLICIES)
def test_a_request_that_fails_is_an_error(name):
    (order,) = make_orders(pipe(), 1)
    order.request.scheduler = "none"  # found when its drawing begins
    with pytest.raises(RuntimeError, match="request 0 was not drawn"):
        driven(name, [order])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--clients 0", "clients 0: expected 1 or more"),
        ("--rates 0", "rates 0: expected numbers above 0"),
        ("--rates nan", "rates nan: expected"),
        ("--requests 0", "requests 0: expected 1 or more"),
        ("--repeats 0", "repeats 0: expected 1 or more"),
        ("--rows -1", "rows -1: expected 1 or more"),
        ("--window -1", "window -1: expected seconds"),
        ("--clients --rates", "clients: none, and no rates"),
    ],
)
def test_nothing_to_measure_is_bad_input(given, said, tmp_path, capsys):
    assert serving.main([*given.split(), "--out", str(tmp_path)]) == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1


def test_a_model_without_an_adapter_is_bad_input(tmp_path, capsys):
    assert serving.main(["--model", str(saved_model.folder()), "--out", str(tmp_path)]) == 2
    assert "has none; name one" in capsys.readouterr().err
