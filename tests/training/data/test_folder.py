"""training.data.folder: the layouts that data sets come in, and that nothing in them is lost silently."""

import csv
import json
import os
import time

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from runtime.errors import InputError
from tests.training.data.test_sources import picture, pictures_in, samples
from training.config import TrainConfig
from training.data import folder as module
from training.data.sources import open_source


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


def unused(data, **options):
    return open_source(TrainConfig(data=str(data), **options)).unused


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("place", ["", "train", "train/photos"])
def test_a_table_names_the_files_of_the_folder_that_it_lies_in(place, ending, data):
    below = data / place
    pictures_in(below, ["a.png", "deep/b.png"])
    write_rows(
        below / f"metadata{ending}",
        [{"file_name": "a.png", "text": "one"}, {"file_name": "deep/b.png", "text": "two, too"}],
    )
    assert [(s.caption, s.image) for s in samples(data)] == [
        ("one", (below / "a.png").read_bytes()), ("two, too", (below / "deep/b.png").read_bytes())
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("image", "condition"),
    [
        ("file_name", "conditioning_image_file_name"),
        ("image", "conditioning_image"),
        ("image_file_name", "edges"),
    ],
)
@pytest.mark.parametrize("caption", ["text", "caption"])
def test_diffusers_examples_have_conditions_in_a_column(image, condition, caption, data):
    pictures_in(
        data, ["images/0.png", "images/1.png", "conditioning_images/0.png", "conditioning_images/1.png"]
    )
    rows = [
        {image: f"images/{i}.png", condition: f"conditioning_images/{i}.png", caption: f"caption {i}"}
        for i in (0, 1)
    ]
    write_rows(data / "train.jsonl", rows)
    for name in {condition, condition.removesuffix("_file_name")}:
        found = samples(data, condition_from=name)
        assert [s.caption for s in found] == ["caption 0", "caption 1"]
        assert [s.condition for s in found] == [
            (data / f"conditioning_images/{i}.png").read_bytes() for i in (0, 1)
        ]
    left = unused(data)
    assert [line.partition(":")[0] for line in left] == [
        "conditioning_images/0.png",
        "conditioning_images/1.png",
    ]
    assert "--condition-from" in left[0] and not unused(data, condition_from=condition)


def test_conditions_may_lie_beside_the_images_without_a_table(data):
    names = [f"{folder}/{i}.png" for folder in ("images", "conditioning_images") for i in (0, 1)]
    pictures_in(data, names)
    for i in (0, 1):
        (data / f"images/{i}.caption").write_text(f"caption {i}")
    found = samples(data, condition_from="conditioning_images")
    assert [(s.caption, s.condition) for s in found] == [
        (f"caption {i}", (data / f"conditioning_images/{i}.png").read_bytes()) for i in (0, 1)
    ]
    assert len(samples(data)) == 2


def test_a_column_that_a_row_lacks_is_named(data):
    pictures_in(data, ["0.png"])
    write_rows(data / "metadata.jsonl", [{"file_name": "0.png", "text": "a"}])
    with pytest.raises(
        InputError, match=r"metadata.jsonl: line 1: no column 'edges'; it has file_name, text"
    ):
        open_source(TrainConfig(data=str(data), condition_from="edges"))


def test_of_a_folder_with_train_in_it_only_that_is_trained_on(data):
    pictures_in(data, ["train/0.png", "test/1.png", "2.png"])
    for path in data.rglob("*.png"):
        path.with_suffix(".txt").write_text("a")
    assert [s.name for s in samples(data)] == ["train/0.png"]
    assert [s.image for s in samples(data)] == [(data / "train/0.png").read_bytes()]
    assert unused(data) == [
        f"{name}: not in train/" for name in ("2.png", "2.txt", "test/1.png", "test/1.txt")
    ]


def test_an_image_that_a_table_names_twice_is_two_samples(data):
    pictures_in(data, ["0.png"])
    write_rows(data / "metadata.jsonl", [{"file_name": "0.png", "text": text} for text in "ab"])
    assert [s.caption for s in samples(data)] == ["a", "b"]


def test_what_a_table_names_and_is_not_there_is_a_sample_with_an_error(data):
    pictures_in(data, ["0.png"])
    (data.parent / "secret.png").write_bytes(picture(1))
    names = [
        "0.png",
        "gone.png",
        "../secret.png",
        str(data.parent / "secret.png"),
        "x" * 300 + ".png",
        "a\0b.png",
    ]
    write_rows(data / "metadata.jsonl", [{"file_name": name, "text": "a"} for name in names])
    found = {s.error for s in samples(data)}
    assert None in found and "metadata.jsonl names gone.png: no such file" in found
    assert "metadata.jsonl names ../secret.png, which is not in the data's folder" in found
    assert all(s.image != picture(1) for s in samples(data))


def test_pictures_may_be_links_as_in_hugging_faces_cache(data):
    blobs = data.parent / "blobs"
    pictures_in(blobs, ["abc.png"])
    (data / "0.png").symlink_to(blobs / "abc.png")
    write_rows(data / "metadata.jsonl", [{"file_name": "0.png", "text": "a"}])
    assert [s.image for s in samples(data)] == [(blobs / "abc.png").read_bytes()]


def test_an_absolute_name_within_the_data(data, monkeypatch):
    pictures_in(data, ["0.png"])
    write_rows(data / "metadata.jsonl", [{"file_name": str(data / "0.png"), "text": "a"}])
    monkeypatch.chdir(data.parent)
    (data.parent / "link").symlink_to(data)
    for given in (data, "data"):
        assert [(s.name, s.caption, s.error) for s in samples(given)] == [("0.png", "a", None)]


def test_an_odd_name_of_a_picture_counts_once(data):
    pictures_in(data, ["images/a.png"])
    write_rows(data / "images/metadata.jsonl", [{"file_name": "../images/a.png", "text": "a"}])
    assert [(s.name, s.caption) for s in samples(data)] == [("images/a.png", "a")]


def test_a_name_outside_does_not_hide_a_picture(data):
    pictures_in(data, ["a.png"])
    rows = [{"file_name": "../../x/a.png", "text": "a"}, {"file_name": "a.png", "text": "b"}]
    write_rows(data / "metadata.jsonl", rows)
    assert [(s.caption, s.error is None) for s in samples(data)] == [(None, False), ("b", True)]


def test_two_tables_of_one_folder_are_refused(data):
    pictures_in(data, ["a.png"])
    for ending in (".csv", ".jsonl"):
        write_rows(data / f"metadata{ending}", [{"file_name": "a.png", "text": "a"}])
    with pytest.raises(InputError, match=r"metadata.csv and metadata.jsonl; expected one table"):
        open_source(TrainConfig(data=str(data)))


def test_a_table_covers_its_own_folder_only(data):
    pictures_in(data, ["one/a.png", "two/b.png"])
    write_rows(data / "one/metadata.jsonl", [{"file_name": "a.png", "text": "a", "edges": "a.png"}])
    (data / "two/b.txt").write_text("b")
    assert [s.caption for s in samples(data)] == ["a", "b"] and unused(data) == []
    found = samples(data, condition_from="edges")
    assert [s.error for s in found] == [None, "no condition: no table names the image"]


def test_what_lies_beside_does_not_change_the_fingerprint(data):
    pictures_in(data, ["a.png"])
    (data / "a.txt").write_text("a")
    options = {"cache": str(data / "cache"), "out": str(data / "out")}
    before = open_source(TrainConfig(data=str(data), **options)).fingerprint
    (data / "notes.md").write_text("x")
    (data / "cache").mkdir()
    (data / "cache/x.safetensors").write_bytes(b"x")
    source = open_source(TrainConfig(data=str(data), **options))
    assert source.fingerprint == before and len(source.unused) == 1


def test_an_edit_that_keeps_size_and_time_is_noticed(data):
    pictures_in(data, ["a.png"])
    (data / "a.txt").write_text("a")
    before, times = open_source(TrainConfig(data=str(data))).fingerprint, (data / "a.png").stat()
    time.sleep(0.02)
    changed = bytearray((data / "a.png").read_bytes())
    changed[-1] ^= 1
    (data / "a.png").write_bytes(changed)
    os.utime(data / "a.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_source(TrainConfig(data=str(data))).fingerprint != before


def test_nobodys_files_are_passed_over(data):
    pictures_in(data, ["0.png", "._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/0.png", ".cache/x.png"])
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._0.txt"):
        (data / name).write_bytes(b"x")
    (data / "0.txt").write_text("a")
    assert [s.name for s in samples(data)] == ["0.png"] and unused(data) == []


def test_what_is_not_read_is_listed(data):
    pictures_in(data, ["0.jfif", "1.gif"])
    for name in ("0.txt", "1.txt", "2.heic", "2.txt", "0.npz", "README.md"):
        (data / name).write_text("a")
    assert [s.name for s in samples(data)] == ["0.jfif", "1.gif"]
    assert [line.partition(":")[0] for line in unused(data)] == ["0.npz", "2.heic", "2.txt", "README.md"]


def test_kohyas_repeats_are_said_not_to_count(data):
    pictures_in(data, ["10_dog/0.png"])
    (data / "10_dog/0.txt").write_text("a dog")
    assert len(samples(data)) == 1
    assert unused(data) == ["10_dog/: the repeats in its name (kohya's); each image counts once"]


def test_a_file_of_gigabytes_is_not_read(data, monkeypatch):
    pictures_in(data, ["0.png"])
    (data / "0.txt").write_text("a")
    monkeypatch.setattr(module, "LARGEST_FILE", 10)
    assert samples(data)[0].error.startswith("0.png: ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.csv", b'file_name,text\n0.png,"a\n', "metadata.csv: line "),
        ("metadata.csv", b"file_name,text,text\n0.png,a,b\n", "metadata.csv: two columns named 'text'"),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": "a", "text": "b"}', "'text' is given twice"),
        ("metadata.csv", b"file_name,text\n0.png\n", "metadata.csv: line 2: expected 2 columns"),
        ("metadata.csv", b"file_name,text\n0.png,caf\xe9\n", "metadata.csv: not UTF-8"),
        ("metadata.parquet", b"PAR1 not", "metadata.parquet: not a parquet file"),
        ("metadata.jsonl", b"[" * 100_000, "metadata.jsonl: line 1: expected JSON"),
    ],
)
def test_a_damaged_table_is_named(name, content, said, data):
    pictures_in(data, ["0.png"])
    (data / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_source(TrainConfig(data=str(data)))
    assert said in str(caught.value)


def test_two_columns_of_one_name_in_a_parquet_file_are_named(data):
    pictures_in(data, ["0.png"])
    table = pa.Table.from_arrays([["0.png"], ["a"], ["b"]], ["file_name", "text", "text"])
    parquet.write_table(table, data / "metadata.parquet")
    with pytest.raises(InputError, match="metadata.parquet: two columns named 'text'; expected one"):
        open_source(TrainConfig(data=str(data)))


def test_a_parquet_file_opens_nothing_outside_of_its_folder(data):
    (data.parent / "secret.png").write_bytes(picture(9))
    (data / "inside.bin").write_bytes(picture(3))
    paths = ["../secret.png", str(data.parent / "secret.png"), "http://host/x.png", "foo://x", "inside.bin"]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "text": ["a"] * len(paths)}
    table = pa.table({"image": pa.array(rows["image"]), "text": rows["text"]})
    parquet.write_table(table, data / "a.parquet")
    found = samples(data)
    assert [s.error is None for s in found] == [False, False, False, False, True]
    assert found[-1].image == picture(3) and "not in the data's folder" in found[0].error


def test_parquet_files_are_a_dataset(data):
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(3)], "caption": ["a", "b", "c"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    path = data / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    for given in (data, path):
        assert [(s.caption, s.image) for s in samples(given)] == [
            (c, picture(i)) for i, c in enumerate("abc")
        ]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_table_of_other_columns_says_which_it_has(delimiter, data):
    pictures_in(data, ["a.png"])
    (data / "metadata.csv").write_text(f"file_name{delimiter}text\na.png{delimiter}one\n")
    with pytest.raises(InputError, match="line 2: expected a table .*; its columns are 'file_name.*text'"):
        samples(data)


@pytest.mark.parametrize("name", ["a.TXT", "a.CAPTION", "a.txt"])
def test_captions_in_files_of_upper_case_are_read(name, data):
    pictures_in(data, ["a.png"])
    (data / name).write_text("one")
    assert [s.caption for s in samples(data)] == ["one"]
    assert not unused(data)
