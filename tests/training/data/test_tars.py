"""training.data.tars: tars that are damaged, hostile, or from another system."""

import gzip
import io
import lzma
import tarfile

import pytest

from runtime.errors import InputError
from tests.training.data.test_sources import picture, samples
from training.config import TrainConfig
from training.data import tars as module
from training.data.sources import open_source

COUNT = 20


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for i in range(COUNT):
            add(file, f"{i:04d}.png", picture(i))
            add(file, f"{i:04d}.txt", f"caption {i}".encode())
    return path


def add(file, name, data=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    file.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("member", [1, 2, COUNT, 2 * COUNT - 1])
@pytest.mark.parametrize("byte", [b"\xff", b"\0", b"7"])
def test_a_damaged_header_is_named_and_not_taken_for_the_end(member, byte, tar):
    with tarfile.open(tar) as file:
        offset = file.getmembers()[member].offset
    data = bytearray(tar.read_bytes())
    data[offset + 100 : offset + 156] = byte * 56  # mode, owner, size, time, checksum
    tar.write_bytes(data)
    with pytest.raises(InputError, match=r"a.tar: a broken tar: "):
        samples(tar)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (gzip.compress, "compressed .gunzip it first."),
        (lzma.compress, "compressed .unxz it first."),
        (lambda data: b"<!DOCTYPE html><title>404</title>", "a web page .download it again."),
        (lambda data: b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (lambda data: data[:5000], "cut off"),
    ],
)
def test_what_is_no_plain_tar_is_named(make, kind, tar):
    tar.write_bytes(make(tar.read_bytes()))
    with pytest.raises(InputError, match=rf"a\.tar is {kind}"):
        samples(tar)
    other = tar.rename(tar.with_suffix(".tgz"))
    with pytest.raises(
        InputError, match=r"a\.tgz: a file of another kind; expected an image folder, WebDataset tars"
    ):
        samples(other)


def test_names_that_lead_upwards_are_names_like_others(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, data in {"../a.png": picture(0), "../a.txt": b"one", "../.b.png": picture(1)}.items():
            add(file, name, data)
    assert [(s.name, s.caption) for s in samples(tmp_path / "a.tar")] == [("../a", "one")]


def test_files_after_the_end_are_not_left_out_silently(tar):
    tar.write_bytes(tar.read_bytes() * 2)  # as `cat` joins two
    with pytest.raises(InputError, match="a damaged header, or files after the end"):
        samples(tar)


@pytest.mark.parametrize("kind", module.HEADERS)
def test_a_header_that_claims_gigabytes_takes_none(kind, tmp_path):
    path = tmp_path / "a.tar"
    liar = tarfile.TarInfo("x")
    liar.type, liar.size = kind, 50 * 2**30
    path.write_bytes(liar.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(InputError, match="a broken tar: .*53,687,091,200"):
        samples(path)


def test_a_member_that_is_too_large_is_a_sample_with_an_error(tar, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_FILE", 10)
    assert all("expected at most" in s.error for s in samples(tar))


def test_links_and_litter_are_no_samples(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        add(file, "._0.png", b"x")
        add(file, "__MACOSX/0.png", b"x")
        add(file, "0.png", picture(0))
        add(file, "0.txt", b"a")
        add(file, "1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(file, "2.png", type=tarfile.LNKTYPE, linkname="0.png")
        add(file, "3", type=tarfile.DIRTYPE)
    assert [s.name for s in samples(path)] == ["0"]


def test_two_files_of_one_ending_and_files_of_others_are_told(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name in ("0.png", "0.PNG", "1.png", "1.cls", "1.txt"):
            add(file, name, b"text" if name.endswith("txt") else picture(0))
    first, second = samples(path)
    assert first.error == "two files of one ending" and second.unused == ("1.cls",)


def header(name, size):
    """Return a member's header of any size, with a right checksum."""
    member = tarfile.TarInfo(name)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % 256**12).to_bytes(12, "big")
    block[124] = 0xFF if size < 0 else 0x80
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [-1, -512, -513, -1024])
def test_a_member_of_negative_size_does_not_lead_back(size, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header("0.png", size) + bytes(1024))
    with pytest.raises(InputError, match="a broken tar"):
        samples(path)


@pytest.mark.parametrize("size", ["-512", "-1"])
def test_an_extended_header_of_negative_size_does_not_lead_back(size, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        add(file, "0.png", picture(0), pax_headers={"size": size})
    with pytest.raises(InputError, match="a broken tar"):
        samples(path)


@pytest.mark.parametrize(
    "data",
    [
        "pipe:touch {};.tar",
        "file:{}.tar",
        "https://host/a.tar",
        "s3://bucket/{{000..009}}.tar",
        "pipe:touch {}",
    ],
)
def test_no_url_is_opened_or_run(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    with pytest.raises(InputError, match="is not read; download it first"):
        open_source(TrainConfig(data=data.format(ran)))
    assert not ran.exists()


@pytest.mark.parametrize("prefix", ["./", ""])
def test_a_local_file_may_have_any_name(prefix, tar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "touch ran;.tar").write_bytes(tar.read_bytes())
    assert len(samples(f"{prefix}touch ran;.tar")) == COUNT
    assert not (tmp_path / "ran").exists()


def test_several_patterns_are_read_one_after_the_other(tar, tmp_path):
    (tmp_path / "b.tar").write_bytes(tar.read_bytes())
    assert len(samples(f"{tar}::{tmp_path / 'b.tar'}")) == 2 * COUNT


def test_bad_braces_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file|expected braces"):
        open_source(TrainConfig(data=str(tmp_path / "a{000..00.tar")))
