"""runtime.serve.store: jobs that outlive the server, bounded, and never half-there."""

import pytest

from runtime.errors import InputError
from runtime.serve.limits import Limits
from runtime.serve.refusals import Refusal
from runtime.serve.store import Store

BODY = {"prompt": "a"}


def store(folder, **limits):
    return Store(folder, Limits(**limits))


def done(store, owner="", key=None, size=10, pictures=1):
    job, _ = store.add(BODY, owner, key)
    store.start(job.id)
    store.finish(job.id, [b"x" * size] * pictures, {"images": pictures})
    return job.id


def test_a_jobs_life(tmp_path):
    kept = store(tmp_path)
    job, new = kept.add(BODY, "me")
    assert new and job.state == "queued" and job.body == BODY
    kept.start(job.id)
    assert kept.get(job.id, "me").state == "running"
    kept.finish(job.id, [b"one", b"two"], {"images": 2, "seed": 5})
    found = kept.get(job.id, "me")
    assert found.state == "done" and found.result["seed"] == 5 and found.bytes == 6
    assert kept.picture(found, 1) == b"two"
    with pytest.raises(Refusal, match="image 2: expected 0 to 1"):
        kept.picture(found, 2)


def test_anothers_job_is_not_there(tmp_path):
    kept = store(tmp_path)
    job, _ = kept.add(BODY, "me")
    with pytest.raises(Refusal) as caught:
        kept.get(job.id, "you")
    assert caught.value.status == 404


def test_a_key_is_one_job_of_its_owner(tmp_path):
    kept = store(tmp_path)
    first, _ = kept.add(BODY, "me", "k")
    assert kept.add(BODY, "me", "k") == (first, False)
    assert kept.add(BODY, "you", "k")[0].id != first.id
    assert kept.add(BODY, "me", "")[0] == kept.add(BODY, "me", "")[0]
    with pytest.raises(Refusal, match="used for another request"):
        kept.add({"prompt": "b"}, "me", "k")


def test_after_a_restart_what_was_open_is_interrupted_and_nothing_is_half_there(tmp_path):
    kept = store(tmp_path)
    finished = done(kept)
    waiting, running = kept.add(BODY, "")[0].id, kept.add(BODY, "", "k")[0].id
    kept.start(running)
    (kept.pictures / running).mkdir()
    (kept.pictures / running / "0.png").write_bytes(b"half")  # killed before it was said to be done
    again = store(tmp_path)
    assert [again.get(id, "").state for id in (finished, waiting, running)] == ["done", *["interrupted"] * 2]
    assert [path.name for path in again.pictures.iterdir()] == [finished]
    assert again.reopen(running).state == "queued"
    with pytest.raises(Refusal) as caught:
        again.reopen(finished)
    assert caught.value.status == 409


def test_a_cancelled_job_is_not_done_afterwards(tmp_path):
    kept = store(tmp_path)
    job, _ = kept.add(BODY, "")
    kept.start(job.id)
    kept.end(job.id, "cancelled", {"message": "m"})
    kept.finish(job.id, [b"x"], {"images": 1})
    found = kept.get(job.id, "")
    assert found.state == "cancelled" and found.error == {"message": "m"}
    assert list(kept.pictures.iterdir()) == []
    with pytest.raises(Refusal, match="cancelled; its pictures are there once it is done"):
        kept.picture(found, 0)


def test_a_job_that_is_done_twice_keeps_its_pictures(tmp_path):
    kept = store(tmp_path)
    name = done(kept)
    assert not kept.finish(name, [b"x" * 10], {"images": 1})
    assert kept.picture(kept.get(name, ""), 0) == b"x" * 10


def test_bounded_by_number_but_open_ones_stay(tmp_path):
    kept = store(tmp_path, jobs=3)
    waiting, _ = kept.add(BODY, "")
    ids = [done(kept) for _ in range(4)]
    assert kept.get(waiting.id, "").state == "queued"
    for id in ids[:2]:
        with pytest.raises(Refusal):
            kept.get(id, "")
    assert {path.name for path in kept.pictures.iterdir()} == set(ids[2:])


def test_bounded_by_bytes_and_age(tmp_path):
    kept = store(tmp_path, kept_mib=1)
    ids = [done(kept, size=400_000) for _ in range(4)]
    assert {path.name for path in kept.pictures.iterdir()} == set(ids[2:])
    kept.close()
    again = store(tmp_path, kept_hours=1e-3)
    again._run("UPDATE jobs SET created = created - 10")  # of when they are sent: they ended just now
    again.clean()
    assert len(list(again.pictures.iterdir())) == 2
    again._run("UPDATE jobs SET ended = ended - 10")
    again.clean()
    assert list(again.pictures.iterdir()) == []


@pytest.mark.parametrize("bound", [{"jobs": 4}, {"kept_mib": 1}])
def test_one_owners_jobs_do_not_push_out_anothers(tmp_path, bound):
    kept = store(tmp_path, **bound)
    first = done(kept, "one", size=200_000)
    many = [done(kept, "two", size=250_000) for _ in range(6)]
    assert kept.get(first, "one").state == "done"
    assert {path.name for path in kept.pictures.iterdir()} == {first, *many[-3:]}


def test_another_format_is_begun_anew(tmp_path):
    kept = store(tmp_path)
    done(kept)
    kept._run("PRAGMA user_version = 99")
    kept.close()
    again = store(tmp_path)
    assert list(again.pictures.iterdir()) == [] and done(again)


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database at all, but long enough to be read as one" * 40)
    with pytest.raises(InputError, match="file is not a database; move it away"):
        store(tmp_path)


def test_a_job_that_finds_no_room_is_as_it_was(tmp_path):
    kept = store(tmp_path)
    job, _ = kept.add(BODY, "")
    kept.end(job.id, "failed", {"message": "m"})
    before = kept.get(job.id, "")
    kept.reopen(job.id)
    kept.put_back(before)
    assert kept.get(job.id, "") == before
    assert not kept.remove(kept.add(BODY, "")[0].id, ended=True) and kept.remove(job.id, ended=True)
