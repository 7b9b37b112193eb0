"""training.data.cache: what is put in comes out, or is missing; never anything else."""

import errno
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch

from runtime.errors import InputError
from runtime.loading.weights import weights_digest
from training.data import cache
from training.data.cache import Store, digest

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]
SHAPES = [(), (1,), (0,), (3, 0), (4, 5, 6), (2, 3, 4, 5)]


def opened(folder, **settings):
    return Store(folder, "latents", {"vae": "a", **settings})


def filled(folder, rows, **settings):
    """A store with rows of one number each, one shard a row."""
    store = opened(folder, **settings)
    for key, number in rows.items():
        store.add(key, {"x": torch.tensor([float(number)])})
        store.flush()
    return store


def shards(store):
    return sorted(store.folder.glob("*.safetensors"))


def shard_of(store, key):
    """The shard of a row: `filled` makes one for each."""
    (path,) = (p for p in shards(store) if f"{key}/x".encode() in p.read_bytes())
    return path


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_dtype_and_shape_come_back_before_and_after_they_are_written(dtype, tmp_path):
    row = {f"of shape {shape}": (torch.rand(shape) * 100).to(dtype) for shape in SHAPES}
    store = opened(tmp_path)
    store.add("key", row)
    assert_equal(store.get("key"), row)
    store.flush()
    assert_equal(store.get("key"), row)
    assert_equal(opened(tmp_path).get("key"), row)


def test_rows_of_a_batch_and_other_layouts_are_stored_by_value(tmp_path):
    batch = torch.rand(2, 4, 6, 8)
    rows = {
        "first": batch[0],
        "second": batch[1],
        "turned": torch.rand(4, 6).T,
        "thinned": torch.rand(9)[::2],
    }
    store = opened(tmp_path)
    for key, value in rows.items():
        store.add(key, {"x": value})
    store.flush()
    for key, value in rows.items():
        assert torch.equal(opened(tmp_path).get(key)["x"], value)


def test_a_row_knows_its_own_names_and_a_store_its_keys(tmp_path):
    store = opened(tmp_path)
    store.add("a", {"x": torch.ones(1), "y": torch.zeros(2)})
    store.add("b", {"z": torch.ones(3)})
    assert len(store) == 2 and "a" in store and "c" not in store
    store.flush()
    again = opened(tmp_path)
    assert len(again) == 2 and "b" in again and "c" not in again
    assert again.get("a").keys() == {"x", "y"} and again.get("b").keys() == {"z"}
    with pytest.raises(KeyError):
        again.get("c")


def test_nothing_is_on_the_disk_before_something_was_added(tmp_path):
    store = opened(tmp_path)
    store.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_written_by_itself_once_it_is_large_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 1000)
    store = opened(tmp_path)
    for i in range(25):
        store.add(f"{i}", {"x": torch.full((25,), float(i))})  # 100 bytes
    assert len(shards(store)) == 2 and len(opened(tmp_path)) == 20
    store.flush()
    assert len(shards(store)) == 3 and len(opened(tmp_path)) == 25
    assert all(store.get(f"{i}")["x"][0] == i for i in range(25))


def test_a_shard_is_named_by_its_hash(tmp_path):
    """sha256sum of coreutils says the same."""
    import hashlib

    store = filled(tmp_path, {"a": 1})
    (path,) = shards(store)
    assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def edit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def append(path):
    path.write_bytes(path.read_bytes() + b"\0")


def zero(path):
    """As a file system leaves it whose blocks never reached the disk."""
    path.write_bytes(bytes(path.stat().st_size))


def foreign(path):
    """A good safetensors file that is another one's."""
    (other,) = (p for p in path.parent.glob("*.safetensors") if p != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("harm", [truncate, empty, edit, append, zero, foreign], ids=lambda f: f.__name__)
def test_a_damaged_shard_is_removed_and_its_rows_alone_are_missing(harm, tmp_path):
    damaged = shard_of(filled(tmp_path, {"bad": 1, "good": 2}), "bad")
    harm(damaged)
    store = opened(tmp_path)
    assert store.discarded == 1 and not damaged.exists()
    assert "bad" not in store and store.get("good")["x"].item() == 2
    with pytest.raises(KeyError):
        store.get("bad")


def test_a_shard_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch):
    path = shard_of(filled(tmp_path, {"a": 1}), "a")

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cache, "sha256", fail)
    with pytest.raises(OSError, match="Input/output error"):
        opened(tmp_path)
    monkeypatch.undo()
    assert path.exists() and opened(tmp_path).get("a")["x"].item() == 1


def test_a_removed_row_can_be_computed_again(tmp_path):
    damaged = shard_of(filled(tmp_path, {"bad": 1, "good": 2}), "bad")
    truncate(damaged)
    filled(tmp_path, {"bad": 1})
    assert damaged.exists() and opened(tmp_path).discarded == 0
    assert opened(tmp_path).get("bad")["x"].item() == 1


def test_what_a_killed_process_left_half_written_is_no_shard(tmp_path):
    store = filled(tmp_path, {"a": 1})
    (store.folder / ".0123.safetensors.part").write_bytes(b"torn")
    again = opened(tmp_path)
    assert len(again) == 1 and again.discarded == 0


def test_other_settings_are_another_store(tmp_path):
    filled(tmp_path, {"a": 1})
    other = opened(tmp_path, dtype="bf16")
    assert "a" not in other and other.folder != opened(tmp_path).folder
    assert "a" not in Store(tmp_path, "text", {"vae": "a"})


def test_the_order_of_settings_does_not_matter(tmp_path):
    first, second = {"vae": "a", "crops": 2}, {"crops": 2, "vae": "a"}
    assert Store(tmp_path, "latents", first).folder == Store(tmp_path, "latents", second).folder


def test_settings_lie_beside_the_shards(tmp_path):
    store = filled(tmp_path, {"a": 1}, crops=2)
    written = json.loads((store.folder / "settings.json").read_text())
    assert written == {"format": cache.FORMAT, "vae": "a", "crops": 2}


def test_rows_of_an_older_format_are_not_read(tmp_path, monkeypatch):
    filled(tmp_path, {"a": 1})
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert "a" not in opened(tmp_path)


def test_stores_of_other_settings_are_told_by_what_differs(tmp_path):
    filled(tmp_path, {"a": 1}, dtype="fp16", crops=1)
    filled(tmp_path, {"a": 1}, dtype="bf16")
    mine = opened(tmp_path, dtype="bf16", crops=1)
    (tmp_path / "text-0").mkdir()
    (tmp_path / "text-0" / "settings.json").write_text("{}")
    said = [line.partition(": ")[2] for line in mine.others()]
    assert sorted(said) == ["crops None, now 1", "dtype 'fp16', now 'bf16'"]
    assert [line.partition(": ")[0] for line in mine.others()] == [
        folder.name for folder in sorted(tmp_path.glob("latents-*")) if folder != mine.folder
    ]


def test_damaged_settings_of_another_store_are_one_line(tmp_path):
    store = filled(tmp_path, {"a": 1})
    (store.folder / "settings.json").write_text("{")
    with pytest.raises(InputError, match="settings.json: not a JSON file"):
        Store(tmp_path, store.kind, {"other": 1}).others()


def test_there_are_no_others_where_nothing_else_was_kept(tmp_path):
    assert filled(tmp_path, {"a": 1}).others() == []


def test_two_writers_of_one_folder_keep_each_others_rows(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    for i in range(10):
        writer = (first, second)[i % 2]
        writer.add(f"{i}", {"x": torch.tensor([i])})
        writer.flush()
    assert len(first) == len(second) == 5
    first.refresh()
    second.refresh()
    assert all(store.get(f"{i}")["x"].item() == i for i in range(10) for store in (first, second))


def test_two_writers_of_the_same_row_leave_one(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    for writer in (first, second):
        writer.add("a", {"x": torch.ones(3)})
    first.flush()
    second.flush()
    assert len(shards(first)) == 1 and torch.equal(opened(tmp_path).get("a")["x"], torch.ones(3))


def _write(folder, numbers):
    filled(folder, {f"{n}": n for n in numbers})


def test_processes_may_write_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path, range(start, start + 20))) for start in (0, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = opened(tmp_path)
    assert [writer.exitcode for writer in writers] == [0, 0] and store.discarded == 0
    assert all(store.get(f"{n}")["x"].item() == n for n in range(40))


def test_a_refresh_reads_only_what_is_new(tmp_path, monkeypatch):
    store = filled(tmp_path, {"a": 1})
    filled(tmp_path, {"b": 2})
    read = []
    digest_of = cache.sha256
    monkeypatch.setattr(cache, "sha256", lambda path: read.append(path) or digest_of(path))
    store.refresh()
    store.refresh()
    assert read == [shard_of(store, "b")]


def test_a_store_can_be_sent_to_a_worker(tmp_path):
    store = filled(tmp_path, {"a": 1})
    store.get("a")  # a file is open
    store.add("b", {"x": torch.tensor([2.0])})
    sent = pickle.loads(pickle.dumps(store))
    assert sent.get("a")["x"].item() == 1 and sent.get("b")["x"].item() == 2
    assert store.get("a")["x"].item() == 1


@pytest.fixture
def fill_disk(monkeypatch):
    """From its call on every file is cut off in the middle."""

    def write_some(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(Path, "write_bytes", write_some)


def test_a_full_disk_is_an_input_error_that_leaves_nothing_half_written(tmp_path, fill_disk):
    store = filled(tmp_path, {"a": 1})
    store.add("b", {"x": torch.ones(1000)})
    fill_disk()
    with pytest.raises(InputError, match="cache: cannot write to .*latents-.*No space left on device"):
        store.flush()
    assert sorted(p.name for p in store.folder.iterdir()) == [shard_of(store, "a").name, "settings.json"]
    again = opened(tmp_path)
    assert again.get("a")["x"].item() == 1 and "b" not in again and again.discarded == 0


def test_rows_are_not_lost_to_a_full_disk_that_is_emptied(tmp_path, fill_disk, monkeypatch):
    store = opened(tmp_path)
    store.add("a", {"x": torch.ones(1000)})
    fill_disk()
    with pytest.raises(InputError):
        store.flush()
    monkeypatch.undo()
    store.flush()
    assert torch.equal(opened(tmp_path).get("a")["x"], torch.ones(1000))


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = opened(tmp_path / "file")
    store.add("a", {"x": torch.ones(1)})
    with pytest.raises(InputError, match="cache: cannot write to"):
        store.flush()


def test_nothing_is_left_named_part(tmp_path):
    filled(tmp_path, {"a": 1, "b": 2})
    assert [p for p in tmp_path.rglob("*") if "part" in p.suffix] == []


def test_a_digest_tells_apart_where_one_part_ends_and_the_next_begins():
    assert (
        len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("abc", ""), digest("", "abc")}) == 5
    )
    assert digest("a", "ü") == digest(b"a", "ü".encode())
    assert len(digest()) == 32


def test_a_models_digest_changes_with_any_value_name_dtype_or_shape():
    def linear(**more):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.nn.Linear(4, 6, **more)

    changed = linear()
    with torch.no_grad():
        changed.weight[3, 2] = torch.nextafter(changed.weight[3, 2], torch.tensor(9.0))
    reshaped = linear()
    reshaped.weight.data = reshaped.weight.data.reshape(4, 6)
    others = [changed, reshaped, linear(bias=False), linear().bfloat16(), torch.nn.Sequential(linear())]
    assert len({weights_digest(model) for model in [linear(), *others]}) == 6
    assert weights_digest(linear()) == weights_digest(linear())
    assert weights_digest(linear(), changed) != weights_digest(changed, linear())


def test_a_models_digest_does_not_depend_on_its_memory_format():
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, 3)
    before = weights_digest(model)
    assert weights_digest(model.to(memory_format=torch.channels_last)) == before
