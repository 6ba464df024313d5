"""Archives of others: unpacked whole or not at all, and never out of their folder."""

import errno
import gzip
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from formats.packed import TREE, add_special, add_zip_link, special, tree, write_archive
from worstgroup.benchmark.archives import is_archive, unpack
from worstgroup.benchmark.errors import CorruptFile, DiskError
from worstgroup.benchmark.home import TEMPORARY

FORMATS = ("set.tar", "set.tar.gz", "set.tgz", "set.zip", "SET.ZIP")


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


def quiet(what: str, done: int, total: int) -> None:
    """Nobody is told."""


def around(folder: Path) -> dict[str, bytes]:
    """What lies below a folder, but for the lock files of the test's home."""
    return {name: content for name, content in tree(folder).items() if not name.startswith("home/locks/")}


def listed(archive: Path) -> list[str]:
    """What the standard library says is in a tar."""
    with tarfile.open(archive) as tar:
        return tar.getnames()


def refused(archive: Path, into: Path, *words: str) -> None:
    """The archive is refused with these words in one line, and leaves nothing inside or outside of the folder."""
    before = around(archive.parent)
    with pytest.raises(CorruptFile) as error:
        unpack(archive, into, quiet)
    for word in (str(archive), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert around(archive.parent) == before
    assert not into.exists()


# ---------------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_tree(tmp_path: Path, name: str) -> None:
    archive, into = write_archive(tmp_path / "set.zip" if name.isupper() else tmp_path / name), tmp_path / "a/data"
    archive = archive.rename(tmp_path / name)
    told: list[tuple[str, int, int]] = []
    assert unpack(archive, into, lambda *news: told.append(news)) == [into / "birds"]
    assert tree(into) == TREE
    total = sum(map(len, TREE.values()))
    assert {(what, size) for what, _, size in told} == {(f"unpacking {name}", total)}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == total
    assert [path.name for path in into.iterdir()] == ["birds"]  # no temporary folder
    assert archive.exists()


def test_which_names_are_archives() -> None:
    assert all(map(is_archive, FORMATS))
    assert not any(map(is_archive, ("train-images-idx3-ubyte.gz", "masks.pkl", "a.tar.xz", "zip", "a.7z")))


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.7z"
    path.write_bytes(b"7z")
    refused(path, tmp_path / "into", ".tar.gz")


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "set.tar", tmp_path / "into", "cannot be read")


def test_a_gzip_that_was_unpacked_under_its_name_is_read(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "set.tar").rename(tmp_path / "set.tar.gz")
    unpack(archive, tmp_path / "into", quiet)
    assert tree(tmp_path / "into") == TREE


def test_the_folder_itself_may_be_a_member(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "set.tar", {"./a/b.txt": b"b"})
    add_special(archive, special("./", tarfile.DIRTYPE))
    assert unpack(archive, tmp_path / "into", quiet) == [tmp_path / "into/a"]
    assert tree(tmp_path / "into") == {"a/b.txt": b"b"}


def test_modes_of_members_are_not_taken_over(tmp_path: Path) -> None:
    info = special("locked", tarfile.DIRTYPE)
    info.mode = 0
    archive = write_archive(tmp_path / "set.tar", {"a.txt": b"a"})
    unpack(add_special(archive, info), tmp_path / "into", quiet)
    assert (tmp_path / "into/locked").stat().st_mode & 0o700 == 0o700


def test_backslashes_part_names(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "set.tar", {"birds\\a.txt": b"a"})
    unpack(archive, tmp_path / "into", quiet)
    assert tree(tmp_path / "into") == {"birds/a.txt": b"a"}


# -------------------------------------------------------------------------------------------------------- merging


def test_what_is_in_the_folder_stays(tmp_path: Path) -> None:
    into = tmp_path / "into"
    for name, content in {
        "birds/mine.txt": b"mine",
        "other/x": b"x",
        "birds/001/a.jpg": TREE["birds/001/a.jpg"],
    }.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_bytes(content)
    before = (into / "birds/001/a.jpg").stat().st_ino
    assert unpack(write_archive(tmp_path / "set.tar"), into, quiet) == [into / "birds"]
    assert tree(into) == {**TREE, "birds/mine.txt": b"mine", "other/x": b"x"}
    assert (into / "birds/001/a.jpg").stat().st_ino == before


def test_unpacking_twice_changes_nothing(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "set.zip")
    unpack(archive, tmp_path / "into", quiet)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "into").rglob("*")}
    assert unpack(archive, tmp_path / "into", quiet) == [tmp_path / "into/birds"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "into").rglob("*")} == times


@pytest.mark.parametrize("where", ["birds/metadata.csv", "birds", "birds/001/a.jpg/x", "birds/002/b.jpg"])
def test_another_file_in_the_way_stops_it_before_anything_moves(tmp_path: Path, where: str) -> None:
    into = tmp_path / "into"
    (into / where).parent.mkdir(parents=True)
    (into / where).write_bytes(b"mine")
    with pytest.raises(CorruptFile, match="Move it away") as error:
        unpack(write_archive(tmp_path / "set.tar.gz"), into, quiet)
    assert str(into / where.removesuffix("/x")) in str(error.value)
    assert tree(into) == {where: b"mine"}
    assert not list(into.rglob(f"{TEMPORARY}*"))


def test_a_link_in_the_way_is_not_written_through(tmp_path: Path) -> None:
    into, victim = tmp_path / "into", tmp_path / "victim.csv"
    (into / "birds").mkdir(parents=True)
    (into / "birds/metadata.csv").symlink_to(victim)
    with pytest.raises(CorruptFile, match=r"metadata\.csv"):
        unpack(write_archive(tmp_path / "set.tar"), into, quiet)
    assert not victim.exists()


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    into = tmp_path / "into"
    (into / f"{TEMPORARY}set.tar/old").mkdir(parents=True)
    assert unpack(write_archive(tmp_path / "set.tar"), into, quiet) == [into / "birds"]
    assert [path.name for path in into.iterdir()] == ["birds"]


# -------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("end", [".tar", ".tar.gz", ".zip"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../evil", "out of the folder"),
        ("birds/../../evil", "out of the folder"),
        ("..\\evil", "out of the folder"),
        ("{outside}/evil", "absolute"),
        ("C:\\evil", "absolute"),
        ("\\\\host\\share\\evil", "absolute"),
        (f"birds/{'x' * 300}", "too long"),
    ],
)
def test_a_name_that_leads_out_is_refused(tmp_path: Path, end: str, name: str, why: str) -> None:
    name = name.replace("{outside}", str(tmp_path))
    refused(write_archive(tmp_path / f"set{end}", {**TREE, name: b"evil"}), tmp_path / "sub/into", repr(name), why)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (b"Z", "neither a file nor a folder"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes, why: str) -> None:
    archive = add_special(write_archive(tmp_path / "set.tar"), special("birds/odd", kind, "metadata.csv"))
    refused(archive, tmp_path / "into", "'birds/odd'", why)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "set.tar", {"a.txt": b"a"})
    add_special(archive, special("out", tarfile.SYMTYPE, str(tmp_path)))
    refused(archive, tmp_path / "into", "'out'", "symbolic link")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    refused(add_zip_link(write_archive(tmp_path / "set.zip"), "out", "/etc"), tmp_path / "into", "'out'", "link")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "set.zip", {"a.txt": b"a"})
    content = bytearray(archive.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    refused(archive, tmp_path / "into", "'a.txt'", "encrypted")


@pytest.mark.parametrize("end", [".tar", ".zip"])
def test_one_name_for_a_file_and_a_folder_is_refused(tmp_path: Path, end: str) -> None:
    refused(write_archive(tmp_path / f"set{end}", {"a/b": b"x", "a": b"y"}), tmp_path / "into", "'a'", "both")


def test_a_negative_size_does_not_send_the_listing_in_circles(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = {"size": "-1536"}  # three blocks back: where it began
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    refused(tmp_path / "set.tar", tmp_path / "into", "broken")


# --------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.zip"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_archive_is_refused(tmp_path: Path, name: str, keep: float) -> None:
    archive = write_archive(tmp_path / name)
    content = archive.read_bytes()
    end = content.rindex(bytes(range(256))) + 256 if name == "set.tar" else len(content)  # tar ends in zeros
    archive.write_bytes(content[: int(end * keep)])
    refused(archive, tmp_path / "into", "Delete it and fetch it again")


def test_a_tar_that_ends_between_two_members_is_truncated(tmp_path: Path) -> None:
    """`tarfile` itself takes this for a whole archive."""
    archive = write_archive(tmp_path / "set.tar")
    with tarfile.open(archive) as tar:
        cut = tar.getmember("birds/002/b.jpg").offset
    archive.write_bytes(archive.read_bytes()[:cut])
    assert listed(archive)[-1] == "birds/001/a.jpg"
    refused(archive, tmp_path / "into", f"byte {cut:,}")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_broken_header_is_not_the_end_of_a_tar(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """`tarfile` itself would drop this member and all behind it without a word."""
    archive = write_archive(tmp_path / "set.tar")
    with tarfile.open(archive) as tar:
        at = tar.getmember("birds/001/a.jpg").offset
    content = bytearray(archive.read_bytes())
    content[at] ^= 1
    archive.write_bytes(pack(bytes(content)))
    assert "birds/001/a.jpg" not in listed(archive)
    refused(archive, tmp_path / "into", f"byte {at:,}")


@pytest.mark.parametrize("name", ["set.tar.gz", "set.zip"])
def test_one_altered_bit_is_found(tmp_path: Path, name: str) -> None:
    archive = write_archive(tmp_path / name, {"a.txt": bytes(range(256)) * 8})
    content = bytearray(archive.read_bytes())
    content[len(content) // 3] ^= 4
    archive.write_bytes(content)
    refused(archive, tmp_path / "into", "broken")


def test_a_gzip_without_its_checksum_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "set.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-8])
    refused(archive, tmp_path / "into", "broken")


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.zip"])
@pytest.mark.parametrize("content", [b"<html>sign in</html>" * 99, bytes(10240), b"\x1f\x8b\x08"])
def test_a_foreign_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, tmp_path / "into", "broken")


def test_an_archive_without_files_is_refused(tmp_path: Path) -> None:
    zipfile.ZipFile(tmp_path / "set.zip", "w").close()
    refused(tmp_path / "set.zip", tmp_path / "into", "holds no files")


# ----------------------------------------------------------------------------------------------------------- disk


def test_too_small_a_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path / "set.tar.gz", {"zeros": bytes(2**22)})
    assert archive.stat().st_size < 2**15
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 0, 2**22 - 1))
    with pytest.raises(DiskError, match=r"set\.tar\.gz.*MiB are needed in .*into.*MiB free"):
        unpack(archive, tmp_path / "a/into", quiet)
    assert not (tmp_path / "a").exists()


def test_many_small_files_need_more_than_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path / "set.tar", {f"{n}.txt": b"x" for n in range(50)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 0, 49 * 2**12))
    with pytest.raises(DiskError):
        unpack(archive, tmp_path / "into", quiet)


@pytest.mark.parametrize("present", [False, True])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    into = tmp_path / "into"
    if present:
        into.mkdir()
        (into / "mine").write_bytes(b"mine")
    archive = write_archive(tmp_path / "set.tar")

    def full(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match="no space left"):
        unpack(archive, into, full)
    assert into.exists() == present
    assert not present or tree(into) == {"mine": b"mine"}
    assert archive.exists()


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(*news: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(write_archive(tmp_path / "set.zip"), tmp_path / "into", interrupt)
    assert not (tmp_path / "into").exists()
