"""training.data.sources: the same samples from a folder, Hugging Face datasets and WebDataset tars."""

import io
import json
import os
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

from runtime.errors import InputError
from training.config import TrainConfig
from training.data.sample import IMAGES, Sample
from training.data.sources import open_source

COUNT = 7
FORMAT_OF = {"jpg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "tif": "tiff"}


def picture(number, ending="png"):
    """An image file that no other number gives."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 0, 0)).save(file, FORMAT_OF.get(ending, ending))
    return file.getvalue()


def samples(data, **options):
    return [sample for _, sample in open_source(TrainConfig(data=str(data), **options)).read()]


def fingerprint(data, **options):
    return open_source(TrainConfig(data=str(data), **options)).fingerprint


def refused(data, **options):
    with pytest.raises(InputError) as caught:
        samples(data, **options)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """Images 0.png to 6.png, with captions beside them."""
    made = tmp_path / "photos"
    made.mkdir()
    for i in range(COUNT):
        (made / f"{i}.png").write_bytes(picture(i))
        (made / f"{i}.txt").write_text(f" caption {i}\n", "utf-8")
    return made


def pictures_in(folder, names):
    """Other pictures under these names; returns the folder."""
    for number, name in enumerate(names, 100):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number, name.rpartition(".")[2]))
    return folder


def test_a_folder_gives_its_files_as_they_are_with_the_captions_beside_them(folder):
    expected = [Sample(f"{i}.png", picture(i), f"caption {i}") for i in range(COUNT)]
    assert samples(folder) == expected


def test_every_kind_of_image_is_found_in_any_case(tmp_path):
    names = [f"{ending[1:]}{ending}" for ending in IMAGES] + ["loud.PNG"]
    pictures_in(tmp_path, [name.replace("PNG", "png") for name in names])
    (tmp_path / "loud.png").rename(tmp_path / "loud.PNG")
    (tmp_path / "jpg.txt").write_text("the only caption")
    (tmp_path / "notes.md").write_text("no image")
    found = {sample.name: sample.caption for sample in samples(tmp_path)}
    assert found == {name: "the only caption" if name == "jpg.jpg" else None for name in names}


def test_subfolders_are_searched(tmp_path):
    pictures_in(tmp_path, ["a/b/1.png", "a/1.png", "1.png"])
    (tmp_path / "a" / "b" / "1.txt").write_text("deep")
    assert [(s.name, s.caption) for s in samples(tmp_path)] == [
        ("1.png", None), ("a/1.png", None), ("a/b/1.png", "deep"),
    ]  # fmt: skip


@pytest.mark.parametrize("data", [b"caf\xc3\xa9", b"\xef\xbb\xbfcaf\xc3\xa9\r\n"], ids=["UTF-8", "Windows"])
def test_captions_are_utf_8_with_or_without_a_mark(data, folder):
    (folder / "0.txt").write_bytes(data)
    assert samples(folder)[0].caption == "café"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_captions_may_be_in_the_encoding_that_their_mark_names(encoding, folder):
    (folder / "0.txt").write_bytes("café".encode(encoding))
    assert samples(folder)[0].caption == "café"


@pytest.mark.parametrize("data", [b"a caf\xe9", "café".encode("utf-16-le"), b"\xff\xfea"], ids=ascii)
def test_a_caption_in_another_encoding_is_a_sample_with_an_error(data, folder):
    (folder / "0.txt").write_bytes(data)
    found = samples(folder)
    assert found[0].error.startswith("0.txt: ") and "save it as UTF-8" in found[0].error
    assert found[1].caption == "caption 1"


def write_table(folder, lines):
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))


def test_captions_may_come_from_a_table(folder):
    pictures_in(folder, ["more/7.png"])
    lines = [{"file_name": f"{i}.png", "said": f"line {i}", "text": "not this"} for i in range(COUNT - 1)]
    lines += [{"file_name": "more/7.png", "said": "of a subfolder"}]
    write_table(folder, [json.dumps(line).encode() for line in lines] + [b"", b"  "])
    captions = [s.caption for s in samples(folder, caption_key="said")]
    assert captions == [*(f"line {i}" for i in range(COUNT - 1)), None, "of a subfolder"]


@pytest.mark.parametrize("separator", ["\u2028", "\x85"], ids=ascii)
def test_what_unicode_calls_a_line_end_is_part_of_a_caption(separator, folder):
    line = {"file_name": "0.png", "text": f"one{separator}two"}
    write_table(folder, [json.dumps(line, ensure_ascii=False).encode()])
    assert samples(folder)[0].caption == f"one{separator}two"


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"1", b'{"text": "a"}', b'{"file_name": {}}', b'{"file_name": "\xff"}']
)
def test_a_bad_line_of_a_table_is_named(line, folder):
    write_table(folder, [b'{"file_name": "0.png", "text": "a"}', line])
    said = refused(folder)
    assert 'metadata.jsonl: line 2: expected JSON with "file_name" and "text"' in said


def test_conditions_and_masks_are_files_of_the_same_names_with_any_ending(folder, tmp_path):
    conditions = pictures_in(tmp_path / "edges", [f"{i}.jpg" for i in range(COUNT)])
    masks = pictures_in(tmp_path / "masks", [f"{i}.webp" for i in range(COUNT)])
    found = samples(folder, condition_from=str(conditions), mask_from=str(masks))
    assert [s.condition for s in found] == [(conditions / f"{i}.jpg").read_bytes() for i in range(COUNT)]
    assert [s.mask for s in found] == [(masks / f"{i}.webp").read_bytes() for i in range(COUNT)]


def test_conditions_of_subfolders_lie_in_the_same_subfolders(tmp_path):
    images = pictures_in(tmp_path / "images", ["a/1.png", "b/1.png"])
    (images / "a" / "1.txt").write_text("a")
    edges = pictures_in(tmp_path / "edges", ["b/1.png", "a/1.png"])
    found = samples(images, condition_from=str(edges))
    assert [s.condition for s in found] == [
        (edges / "a" / "1.png").read_bytes(),
        (edges / "b" / "1.png").read_bytes(),
    ]


def test_conditions_within_the_folder_of_images_are_no_images(folder):
    pictures_in(folder / "edges", [f"{i}.png" for i in range(COUNT)])
    assert len(samples(folder)) == 2 * COUNT
    assert [s.name for s in samples(folder, condition_from=str(folder / "edges"))] == [
        f"{i}.png" for i in range(COUNT)
    ]


def test_what_a_run_draws_within_its_data_is_no_image(folder):
    before = [sample.name for sample in samples(folder)]
    (folder / "run" / "validation").mkdir(parents=True)
    (folder / "run" / "validation" / "00000500.png").write_bytes(picture(9))
    assert [sample.name for sample in samples(folder, out=str(folder / "run"))] == before
    assert (
        len(samples(folder, out=str(folder.parent))) == len(before) + 1
    )  # all of it, in a run around its data


@pytest.mark.parametrize(("option", "what"), [("condition_from", "conditions"), ("mask_from", "masks")])
def test_images_without_a_condition_or_mask_are_counted_and_the_first_ones_listed(
    option, what, folder, tmp_path
):
    other = pictures_in(tmp_path / "other", ["0.png", "3.png"])
    assert (
        refused(folder, **{option: str(other)}) == f"{what} in {other}: 5 of 7 images have none: 1, 2, 4, ..."
    )
    pictures_in(other, ["1.png", "2.png", "4.png"])
    assert refused(folder, **{option: str(other)}) == f"{what} in {other}: 2 of 7 images have none: 5, 6"


@pytest.mark.parametrize("option", ["condition_from", "mask_from"])
def test_a_folder_of_conditions_that_is_not_there_is_named(option, folder, tmp_path):
    assert refused(folder, **{option: str(tmp_path / "none")}).startswith(
        f"{tmp_path / 'none'}: no such folder"
    )


def test_no_data_no_folder_no_images_and_no_captions_are_each_said(folder, tmp_path):
    assert refused("").startswith("data: not given")
    assert refused(tmp_path / "none").startswith(f"data {tmp_path / 'none'}: no such folder")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").startswith(
        f"data {tmp_path / 'empty'}: no images; expected files ending in"
    )
    for text in folder.glob("*.txt"):
        text.unlink()
    assert refused(folder).startswith(f"data {folder}: no captions; expected a .txt beside each image, or")
    assert '"said"' in refused(folder, caption_key="said")


def test_an_image_that_is_gone_since_is_a_sample_with_an_error(folder):
    source = open_source(TrainConfig(data=str(folder)))
    (folder / "2.png").unlink()
    found = [sample for _, sample in source.read()]
    assert found[2] == Sample("2.png", error="No such file or directory")
    assert found[3].image == picture(3)


def changed_image(folder):
    (folder / "2.png").write_bytes(picture(200) + b"\0")


def touched_image(folder):
    os.utime(folder / "2.png", (1, 1))


def new_image(folder):
    (folder / "new.png").write_bytes(picture(9))


def lost_image(folder):
    (folder / "2.png").unlink()


def new_caption(folder):
    (folder / "2.txt").write_text("another")


@pytest.mark.parametrize(
    "change", [changed_image, touched_image, new_image, lost_image, new_caption], ids=lambda f: f.__name__
)
def test_a_folders_fingerprint_changes_with_it(change, folder):
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    change(folder)
    assert fingerprint(folder) != before


def test_a_folders_fingerprint_changes_with_its_conditions(folder, tmp_path):
    edges = pictures_in(tmp_path / "edges", [f"{i}.png" for i in range(COUNT)])
    before = fingerprint(folder, condition_from=str(edges))
    (edges / "1.png").write_bytes(picture(1) + b"\0")
    assert fingerprint(folder, condition_from=str(edges)) != before != fingerprint(folder)


@pytest.fixture(autouse=True)
def _hub_cache(tmp_path, monkeypatch):
    """What `datasets` keeps lies with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()


def table(count=COUNT, first=0):
    rows = {
        "image": [{"bytes": picture(first + i), "path": None} for i in range(count)],
        "text": [f"caption {first + i}" for i in range(count)],
        "edges": [{"bytes": picture(50 + i), "path": None} for i in range(count)],
        "size": list(range(count)),
    }
    image = datasets.Image()
    features = {
        "image": image,
        "text": datasets.Value("string"),
        "edges": image,
        "size": datasets.Value("int64"),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def as_saved(folder, rows):
    rows.save_to_disk(folder)
    return f"hf:{folder}", {}


def as_saved_splits(folder, rows):
    datasets.DatasetDict({"test": table(1, first=40), "train": rows}).save_to_disk(folder)
    return f"hf:{folder}", {}


def as_parquet(folder, rows):
    folder.mkdir(exist_ok=True)
    half = len(rows) // 2
    rows.select(range(half)).to_parquet(folder / "train-0.parquet")
    rows.select(range(half, len(rows))).to_parquet(folder / "train-1.parquet")
    return f"hf:{folder}", {}


def as_stream(folder, rows):
    return as_parquet(folder, rows)[0], {"streaming": True}


HUB = [as_saved, as_saved_splits, as_parquet, as_stream]


@pytest.mark.parametrize("write", HUB, ids=lambda f: f.__name__)
def test_a_dataset_gives_its_rows(write, tmp_path):
    data, options = write(tmp_path / "made", table())
    assert samples(data, **options) == [Sample(f"row {i}", picture(i), f"caption {i}") for i in range(COUNT)]


@pytest.mark.parametrize("write", HUB, ids=lambda f: f.__name__)
def test_columns_are_the_ones_that_are_named(write, tmp_path):
    rows = table().rename_columns({"image": "photo", "text": "said"}).add_column("mask", [None] * COUNT)
    data, options = write(tmp_path / "made", rows)
    columns = {"image_key": "photo", "caption_key": "said", "condition_from": "edges"}
    found = samples(data, **options, **columns)
    assert found[3] == Sample("row 3", picture(3), "caption 3", condition=picture(53))


@pytest.mark.parametrize("write", HUB, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_key": "photo"}, "no column 'photo' for the image"),
        ({"caption_key": "said"}, "no column 'said' for the caption"),
        ({"condition_from": "lines"}, "no column 'lines' for the condition"),
        ({"mask_from": "mask"}, "no column 'mask' for the mask"),
    ],
)
def test_a_column_that_is_not_there_is_answered_with_those_that_are(write, options, said, tmp_path):
    data, more = write(tmp_path / "made", table())
    assert refused(data, **options, **more) == f"data {data}: {said}; it has image, text, edges, size"


def test_a_split_is_chosen_by_its_name(tmp_path):
    data, _ = as_saved_splits(tmp_path / "made", table())
    assert [s.caption for s in samples(f"{data}@test")] == ["caption 40"]
    assert refused(f"{data}@none") == f"data {data}@none: no split 'none'; it has test, train"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_or_split_that_is_not_there_is_named(streaming, tmp_path):
    data, _ = as_parquet(tmp_path / "made", table())
    assert refused(f"{data}@none", streaming=streaming).startswith(f"data {data}@none: ")
    assert refused(f"hf:{tmp_path / 'absent'}", streaming=streaming).startswith(
        f"data hf:{tmp_path / 'absent'}: "
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_without_pictures_are_refused(streaming, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [1, 2], "text": ["one", "two"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(
        InputError, match=r"rows\.parquet: (column 'image' holds no pictures|cannot be read on): "
    ):
        samples(tmp_path / "rows.parquet", streaming=streaming)


@pytest.mark.parametrize("write", HUB, ids=lambda f: f.__name__)
def test_rows_without_an_image_or_caption_have_none(write, tmp_path):
    rows = table(3).to_dict()
    rows["image"][0], rows["text"][1] = None, None
    data, options = write(tmp_path / "made", datasets.Dataset.from_dict(rows, features=table(1).features))
    assert [(s.image, s.caption) for s in samples(data, **options)] == [
        (b"", "caption 0"), (picture(1), None), (picture(2), "caption 2"),
    ]  # fmt: skip


def test_of_several_captions_the_first_is_taken(tmp_path):
    rows = {"image": table(2)["image"], "text": [["first", "second"], []]}
    data, _ = as_saved(tmp_path / "made", datasets.Dataset.from_dict(rows))
    assert [s.caption for s in samples(data)] == ["first", None]


def test_images_may_be_paths_and_one_that_is_gone_is_a_sample_with_an_error(folder, tmp_path):
    rows = {"image": [str(folder / "0.png"), str(folder / "gone.png")], "text": ["a", "b"]}
    data, _ = as_saved(tmp_path / "made", datasets.Dataset.from_dict(rows))
    found = samples(data)
    assert found[0] == Sample("row 0", picture(0), "a")
    assert found[1].image == b"" and "gone.png" in found[1].error


@pytest.mark.parametrize("streaming", [False, True])
def test_images_may_lie_in_an_archive(streaming, tmp_path):
    (tmp_path / "made").mkdir()
    with zipfile.ZipFile(tmp_path / "made" / "train.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", picture(i))
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"caption {i}"}) for i in range(3)]
        archive.writestr("metadata.jsonl", "\n".join(lines))
    found = samples(f"hf:{tmp_path / 'made'}", streaming=streaming)
    assert found == [Sample(f"row {i}", picture(i), f"caption {i}") for i in range(3)]


@pytest.mark.parametrize("write", HUB, ids=lambda f: f.__name__)
def test_a_datasets_fingerprint_changes_with_it_and_its_columns(write, tmp_path):
    data, options = write(tmp_path / "made", table())
    before = fingerprint(data, **options)
    assert fingerprint(data, **options) == before
    assert fingerprint(data, **options, condition_from="edges") != before
    for path in (tmp_path / "made").glob("*.parquet"):
        path.unlink()
    write(tmp_path / "made", table(first=1))
    assert fingerprint(data, **options) != before


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tar_files(numbers, ending="png"):
    return {
        f"{n:04d}.{kind}": data
        for n in numbers
        for kind, data in ((ending, picture(n, ending)), ("txt", f"caption {n}\n".encode()))
    }


@pytest.fixture
def tars(tmp_path):
    """Two tars, of four and of three samples."""
    write_tar(tmp_path / "shard-000.tar", tar_files(range(4)))
    write_tar(tmp_path / "shard-001.tar", tar_files(range(4, COUNT)))
    return str(tmp_path / "shard-{000..001}.tar")


def test_several_tars_are_read_one_after_the_other(tars):
    assert samples(tars) == [Sample(f"{i:04d}", picture(i), f"caption {i}") for i in range(COUNT)]


@pytest.mark.parametrize("ending", ["jpg", "webp", "tif", "PNG"])
def test_a_tars_images_may_be_of_any_kind(ending, tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"1.{ending}": picture(1, ending.lower()), "1.txt": b"one"})
    assert samples(path) == [Sample("1", picture(1, ending.lower()), "one")]


def test_a_tars_captions_may_be_json(tmp_path):
    said = {"said": "one", "text": "not this"}
    files = {
        "1.png": picture(1),
        "1.json": json.dumps(said).encode(),
        "2.png": picture(2),
        "2.json": b"[" * 100_000,
    }
    files |= {"3.png": picture(3), "4.png": picture(4), "4.json": b"[]", "5.txt": b"no image",
              "6.png": picture(6), "6.json": b'{"said": "a", "said": "b"}'}  # fmt: skip
    found = samples(write_tar(tmp_path / "a.tar", files), caption_key="said")
    assert [(s.name, s.caption, s.error) for s in found] == [
        ("1", "one", None), ("2", None, found[1].error), ("3", None, None),
        ("4", None, "its .json: expected an object"), ("5", "no image", None),
        ("6", None, "its .json: 'said' is given twice in an object; expected it once"),
    ]  # fmt: skip
    assert found[0].image == picture(1) and found[4].image == b"" and found[1].error.startswith("its .json: ")


@pytest.mark.parametrize(("image", "condition"), [("jpg", "png"), ("png", "jpg"), ("png", "edges.png")])
def test_a_tars_conditions_and_masks_are_told_by_their_endings_and_are_no_images(image, condition, tmp_path):
    files = {
        f"1.{image}": picture(1, image),
        f"1.{condition}": picture(2),
        "1.seg.png": picture(3),
        "1.txt": b"one",
    }
    path = write_tar(tmp_path / "a.tar", files)
    expected = Sample("1", picture(1, image), "one", condition=picture(2), mask=picture(3))
    assert samples(path, condition_from=condition, mask_from="seg.png") == [expected]


def test_a_sample_without_its_condition_has_an_empty_one(tars):
    assert samples(tars, condition_from="edges.png")[0].condition == b""


def test_a_tar_that_is_not_there_is_named(tars):
    assert refused(tars.replace("001}", "002}")).endswith(
        "no such file: " + tars.replace("{000..001}", "002")
    )


@pytest.mark.parametrize("cut", [1, 512, 700, 1024, 1536, 1800, 2000])
def test_a_truncated_tar_is_named_before_anything_is_read(cut, tars, tmp_path):
    """Wherever it is cut, within a file, within a header, or between two files."""
    path = tmp_path / "shard-001.tar"
    data = path.read_bytes().rstrip(b"\0") + bytes(1024)
    path.write_bytes(data[:-cut])
    assert refused(tars) == f"data {tars}: {path} is cut off; expected a tar with its end"


def test_a_tar_that_breaks_off_while_it_is_read_is_an_input_error_after_what_came_before(tars, tmp_path):
    liar = tarfile.TarInfo("0009.png")
    liar.size = 5000
    path = tmp_path / "shard-001.tar"
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(6 * 1024, b"\0") + liar.tobuf() + bytes(1024))
    reading = open_source(TrainConfig(data=tars)).read()
    read = [next(reading)[1].image for _ in range(COUNT)]
    assert read == [picture(i) for i in range(COUNT)]
    with pytest.raises(InputError, match="shard-001.tar: a broken tar: unexpected end of data"):
        next(reading)


def test_a_tar_that_is_gone_since_is_an_input_error(tars, tmp_path):
    source = open_source(TrainConfig(data=tars))
    (tmp_path / "shard-000.tar").unlink()
    with pytest.raises(InputError, match="a broken tar: .*No such file or directory"):
        list(source.read())


def test_what_is_no_tar_is_an_input_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(np.random.default_rng(0).bytes(4096) + bytes(1024))
    assert "a broken tar" in refused(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"")
    assert "is cut off" in refused(tmp_path / "a.tar")


def test_a_tar_without_samples_gives_none(tmp_path):
    assert samples(write_tar(tmp_path / "a.tar", {})) == []


def test_a_tars_fingerprint_changes_with_it(tars, tmp_path):
    before = fingerprint(tars)
    assert fingerprint(tars) == before != fingerprint(tars.replace("..001", "..000"))
    write_tar(tmp_path / "shard-001.tar", tar_files(range(4, COUNT + 1)))
    assert fingerprint(tars) != before


@pytest.mark.parametrize(
    "options", [{"caption_key": "said"}, {"condition_from": "edges.png"}, {"mask_from": "mask.png"}], ids=str
)
def test_a_tars_fingerprint_changes_with_what_is_read_of_it(options, tars):
    assert fingerprint(tars, **options) == fingerprint(tars, **options) != fingerprint(tars)


def test_tars_are_shared_out_by_the_reader_and_not_by_webdataset(tars, monkeypatch):
    """Which would see a launch of two processes, and refuse."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(samples(tars)) == COUNT


@pytest.fixture(params=["folder", "tars", *HUB], ids=lambda kind: getattr(kind, "__name__", kind))
def source(request, tmp_path):
    """A source of each kind, of the same seven samples."""
    if isinstance(request.param, str):
        return open_source(TrainConfig(data=str(request.getfixturevalue(request.param))))
    data, options = request.param(tmp_path / "made", table())
    return open_source(TrainConfig(data=data, **options))


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_the_parts_of_any_source_are_the_whole(parts, source):
    whole = list(source.read())
    read = [list(source.read(part, parts)) for part in range(parts)]
    assert [number for number, _ in whole] == list(range(COUNT))
    assert [[number for number, _ in part] for part in read] == [
        list(range(p, COUNT, parts)) for p in range(parts)
    ]
    assert sorted((one for part in read for one in part), key=lambda numbered: numbered[0]) == whole


def test_a_source_can_be_read_again(source):
    assert list(source.read()) == list(source.read())
    assert [s.caption for _, s in source.read()] == [f"caption {i}" for i in range(COUNT)]
