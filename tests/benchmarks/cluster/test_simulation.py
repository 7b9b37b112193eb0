"""benchmarks.cluster.simulation: what can be said without it comes out of it."""

import pytest

from benchmarks.cluster.simulation import AT_ONCE, Costs, Replica, main, simulate, tick

COSTS = Costs(step=0.03, around=0.1, steps=30, proxy=0.001, ingress=0.004)  # a picture a second


def test_a_request_alone_takes_its_own_time():
    found = simulate(COSTS, count=1000, rate=1.0, seconds=300)
    assert found["p50_s"] == pytest.approx(1.005, abs=0.002) and found["p95_s"] < 1.2
    assert found["pictures_per_s"] == pytest.approx(1.0, rel=0.15)


def test_so_many_replicas_draw_so_many_pictures():
    for count in (2, 20):
        found = simulate(COSTS, count, rate=0.8 * count, seconds=200)
        assert found["pictures_per_s"] == pytest.approx(0.8 * count, rel=0.1)
        assert simulate(COSTS, count, rate=2.0 * count, seconds=200)["pictures_per_s"] == pytest.approx(
            count, rel=0.05
        )


def test_more_than_pass_the_ingress_are_not_drawn():
    found = simulate(COSTS, count=1000, rate=500.0, seconds=20)
    assert found["ingress_busy"] == 1.0 and found["pictures_per_s"] == pytest.approx(250, rel=0.05)


def test_a_step_has_room_for_so_many():
    replica, done = Replica(), []
    replica.waiting.extend([0.0] * 10)
    assert tick(replica, COSTS, 0.0, done) == pytest.approx(AT_ONCE * (COSTS.step + COSTS.around / 2))
    assert (len(replica.running), len(replica.waiting), done) == (AT_ONCE, 10 - AT_ONCE, [])


def test_the_same_seed_is_the_same_day():
    assert simulate(COSTS, 5, 4.0, 30) == simulate(COSTS, 5, 4.0, 30) != simulate(COSTS, 5, 4.0, 30, seed=1)


def test_costs_that_were_not_measured_are_refused(tmp_path, capsys):
    assert main(["--costs", str(tmp_path / "none.csv"), "--out", str(tmp_path)]) == 2
    assert "python -m benchmarks.cluster first" in capsys.readouterr().err
