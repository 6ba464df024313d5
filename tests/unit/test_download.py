"""Files of datasets: fetched whole or not at all, from a server that does what it can against it."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from formats.packed import TREE, tree, write_archive
from formats.web import Page, Web, serve
from worstgroup.benchmark import download
from worstgroup.benchmark.download import fetch_dataset, fetch_file
from worstgroup.benchmark.errors import CorruptFile, DiskError, MissingData
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.spec import Card, Recipe, Source

DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
MD5 = hashlib.md5(DATA).hexdigest()


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses are noted and not made; no proxy stands between."""
    made: list[float] = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=made.append))
    monkeypatch.setenv("no_proxy", "*")
    return made


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as server:
        yield server


def quiet(what: str, done: int, total: int) -> None:
    """Nobody is told."""


def source(*urls: str, **known: Any) -> Source:
    return Source("set.bin", urls=urls, **known)


def fetch(folder: Path, *urls: str, **known: Any) -> Path:
    return fetch_file(source(*urls, **known), folder, quiet)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def partly(folder: Path, web: Web, page: Page, **known: Any) -> str:
    """Leave the first bytes of a page as a part, by a fetch that an interrupt ends; returns the url."""

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    url = web.add("partly", page)
    page.stalls = [100_000]
    with pytest.raises(KeyboardInterrupt):
        fetch_file(source(url, **known), folder, interrupt)
    web.requests.clear()
    return url


def part_of(folder: Path) -> int:
    return (folder / "set.bin.part").stat().st_size


# ---------------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("known", [{}, {"md5": MD5}, {"md5": MD5.upper(), "size": 300_000}, {"size": 300_000}])
def test_a_file_is_fetched(tmp_path: Path, web: Web, known: dict[str, Any]) -> None:
    told: list[tuple[str, int, int]] = []
    url = web.add("a", Page(DATA))
    path = fetch_file(source(url, **known), tmp_path / "new/folder", lambda *news: told.append(news))
    assert path == tmp_path / "new/folder/set.bin"
    assert path.read_bytes() == DATA
    assert files(path.parent) == ["set.bin"]
    assert told[-1] == ("fetching set.bin", 300_000, 300_000)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})


def test_a_whole_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(DATA)
    before = (tmp_path / "set.bin").stat()
    for known in ({}, {"md5": MD5}, {"size": 300_000}):
        assert fetch(tmp_path, "https://nobody.invalid/set.bin", **known) == tmp_path / "set.bin"
    assert (tmp_path / "set.bin").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("known", [{"md5": MD5}, {"size": 300_000}])
def test_a_file_that_is_not_whole_is_replaced_by_one_that_is(tmp_path: Path, web: Web, known: dict[str, Any]) -> None:
    (tmp_path / "set.bin").write_bytes(b"half")
    with pytest.raises(MissingData):
        fetch(tmp_path, web.add("gone", Page(statuses=[404])), **known)
    assert (tmp_path / "set.bin").read_bytes() == b"half"
    assert fetch(tmp_path, web.add("a", Page(DATA)), **known).read_bytes() == DATA


@pytest.mark.parametrize("known", [{}, {"md5": MD5}, {"size": 300_000}])
def test_a_chunked_file_is_fetched(tmp_path: Path, web: Web, known: dict[str, Any]) -> None:
    assert fetch(tmp_path, web.add("a", Page(DATA, chunked=True)), **known).read_bytes() == DATA


def test_a_chunked_file_that_is_longer_than_published_is_refused(tmp_path: Path, web: Web) -> None:
    with pytest.raises(MissingData, match="it has 300,000 bytes, not 200,000"):
        fetch(tmp_path, web.add("a", Page(DATA, chunked=True)), size=200_000)


def test_a_chunked_file_that_breaks_off_is_not_taken_for_whole(tmp_path: Path, web: Web) -> None:
    url = web.add("a", Page(DATA, chunked=True, cuts=[1000]))
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert web.ranges == ["", "bytes=1000-", ""]  # without a length it is not known to be the same version


@pytest.mark.parametrize(("known", "whole"), [({}, False), ({"md5": MD5}, True), ({"size": 300_000}, True)])
def test_a_file_of_untold_length_needs_a_checksum(tmp_path: Path, web: Web, known: dict[str, Any], whole: bool) -> None:
    url = web.add("a", Page(DATA, declare=False))
    if whole:
        assert fetch(tmp_path, url, **known).read_bytes() == DATA
    else:
        with pytest.raises(MissingData, match="nothing tells how long"):
            fetch(tmp_path, url)


@pytest.mark.parametrize("declare", [True, False])
def test_what_comes_after_the_file_is_not_read(
    tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch, declare: bool
) -> None:
    monkeypatch.setattr(download, "PATIENCE", 1.0)
    page = Page(DATA, declare=declare)
    url = partly(tmp_path, web, page, md5=MD5)
    page.surplus = b"more" * 1000
    assert fetch(tmp_path, url, md5=MD5).read_bytes() == DATA
    assert len(web.requests) == 1


def test_a_redirect_is_followed(tmp_path: Path, web: Web) -> None:
    web.add("b", Page(DATA, cuts=[100_000]))
    url = web.add("a", Page(location="/b"))
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert web.requests[-1] == ("b", "bytes=100000-")


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("known", [{}, {"md5": MD5}])
def test_a_cut_connection_goes_on_where_it_was(
    tmp_path: Path, web: Web, pauses: list[float], known: dict[str, Any]
) -> None:
    url = web.add("a", Page(DATA, etag='"1"', cuts=[100_000, 50_000]))
    assert fetch(tmp_path, url, **known).read_bytes() == DATA
    assert web.ranges == ["", "bytes=100000-", "bytes=150000-"]
    assert pauses == [1.0, 1.0]  # progress makes patience new


def test_a_server_without_ranges_is_read_from_the_start(tmp_path: Path, web: Web) -> None:
    url = web.add("a", Page(DATA, ranges=False, cuts=[100_000]))
    assert fetch(tmp_path, url, md5=MD5).read_bytes() == DATA
    assert web.ranges == ["", "bytes=100000-"]


def test_a_server_without_ranges_that_always_breaks_is_given_up(tmp_path: Path, web: Web, pauses: list[float]) -> None:
    url = web.add("a", Page(DATA, ranges=False, cuts=[100_000] * 9))
    with pytest.raises(MissingData, match="broke after 100,000 of 300,000 bytes"):
        fetch(tmp_path, url)
    assert pauses == [1.0, 2.0, 4.0]


def test_a_silent_server_is_asked_again(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    url = web.add("a", Page(DATA, stalls=[100_000]))
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert web.ranges == ["", "bytes=100000-"]


def test_a_server_that_stays_silent_is_given_up(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE", 0.05)
    url = web.add("a", Page(DATA, stalls=[0] * 9))
    with pytest.raises(MissingData, match=r"no answer for 0\.05 s"):
        fetch(tmp_path, url)
    assert len(web.requests) == 4


def test_an_interrupt_leaves_the_part(tmp_path: Path, web: Web) -> None:
    url = partly(tmp_path, web, Page(DATA))
    start = part_of(tmp_path)
    assert 0 < start <= 100_000
    assert files(tmp_path) == ["home", "set.bin.part", "set.bin.part.version"]
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert web.ranges == [f"bytes={start}-"]
    assert files(tmp_path) == ["home", "set.bin"]


def test_a_killed_process_is_gone_on_with(tmp_path: Path, web: Web) -> None:
    url = web.add("a", Page(DATA, etag='"1"', stalls=[200_000]))
    code = (
        "import sys; from pathlib import Path; from worstgroup.benchmark import download; "
        "from worstgroup.benchmark.spec import Source; "
        "download.fetch_file(Source('set.bin', urls=(sys.argv[2],)), Path(sys.argv[1]), lambda *news: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), url])
    part, ends = tmp_path / "set.bin.part", time.monotonic() + 20
    pause = threading.Event()
    while not (part.exists() and part.stat().st_size > 100_000) and time.monotonic() < ends:
        pause.wait(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    start = part_of(tmp_path)
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert web.ranges == ["", f"bytes={start}-"]


@pytest.mark.parametrize("known", [{"md5": MD5}, {"size": 300_000}])
def test_a_part_that_is_whole_is_not_asked_for(tmp_path: Path, known: dict[str, Any]) -> None:
    (tmp_path / "set.bin.part").write_bytes(DATA)
    assert fetch(tmp_path, "https://nobody.invalid/set.bin", **known).read_bytes() == DATA
    assert files(tmp_path) == ["home", "set.bin"]


@pytest.mark.parametrize("known", [{}, {"md5": MD5}, {"size": 300_000}])
def test_a_part_that_is_longer_than_the_file_is_thrown_away(tmp_path: Path, web: Web, known: dict[str, Any]) -> None:
    (tmp_path / "set.bin.part").write_bytes(DATA + b"more")
    assert fetch(tmp_path, web.add("a", Page(DATA)), **known).read_bytes() == DATA
    assert web.ranges == ["bytes=300004-", ""]


@pytest.mark.parametrize("place", ["bytes 5-299999/300000", "bytes */300000", "nonsense", "bytes 0-9/*"])
def test_a_range_that_was_not_asked_for_is_not_appended(tmp_path: Path, web: Web, place: str) -> None:
    url = partly(tmp_path, web, Page(DATA, content_range=place), md5=MD5)
    assert fetch(tmp_path, url, md5=MD5).read_bytes() == DATA
    assert web.ranges[-1] == ""


# ---------------------------------------------------------------------------------------------- changed in between


def test_another_version_is_not_appended_to_a_part(tmp_path: Path, web: Web) -> None:
    url = partly(tmp_path, web, Page(OTHER, etag='"1"'))
    web.add("partly", Page(DATA, etag='"2"'))
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert web.ranges[1:] == [""]


def test_another_length_is_another_version(tmp_path: Path, web: Web) -> None:
    url = partly(tmp_path, web, Page(OTHER[:-1]))
    web.add("partly", Page(DATA))
    assert fetch(tmp_path, url).read_bytes() == DATA


def test_a_part_of_unknown_origin_is_resumed_only_with_a_checksum(tmp_path: Path, web: Web) -> None:
    (tmp_path / "set.bin.part").write_bytes(OTHER[:1000])
    url = web.add("a", Page(DATA))
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert web.ranges == ["bytes=1000-", ""]
    (tmp_path / "set.bin").rename(tmp_path / "set.bin.part")
    os.truncate(tmp_path / "set.bin.part", 1000)
    assert fetch(tmp_path, url, md5=MD5).read_bytes() == DATA
    assert web.ranges[2:] == ["bytes=1000-"]


def test_a_checksum_lets_a_mirror_go_on(tmp_path: Path, web: Web) -> None:
    first = web.add("a", Page(DATA, etag='"a"', cuts=[100_000, 0, 0, 0, 0]))
    second = web.add("b", Page(DATA, etag='"b"'))
    assert fetch(tmp_path, first, second, md5=MD5).read_bytes() == DATA
    assert web.requests[-1] == ("b", "bytes=100000-")


def test_a_part_of_another_version_is_no_fault_of_the_url(tmp_path: Path, web: Web) -> None:
    (tmp_path / "set.bin.part").write_bytes(OTHER[:100_000])
    assert fetch(tmp_path, web.add("a", Page(DATA)), md5=MD5).read_bytes() == DATA
    assert web.ranges == ["bytes=100000-", ""]


# ------------------------------------------------------------------------------------------------------- failures


def test_wrong_bytes_are_thrown_away_and_the_next_url_is_tried(tmp_path: Path, web: Web) -> None:
    wrong, right = web.add("wrong", Page(OTHER)), web.add("right", Page(DATA))
    assert fetch(tmp_path, wrong, right, md5=MD5).read_bytes() == DATA
    assert web.requests == [("wrong", ""), ("right", "")]
    assert files(tmp_path) == ["home", "set.bin"]


def test_wrong_bytes_leave_nothing(tmp_path: Path, web: Web) -> None:
    with pytest.raises(MissingData, match=f"its MD5 is {hashlib.md5(OTHER).hexdigest()}, not {MD5}"):
        fetch(tmp_path, web.add("wrong", Page(OTHER)), md5=MD5)
    assert files(tmp_path) == ["home"]


def test_another_size_is_refused_before_it_is_read(tmp_path: Path, web: Web) -> None:
    told: list[Any] = []
    url = web.add("a", Page(DATA))
    with pytest.raises(MissingData, match="it has 300,000 bytes, not 300,001"):
        fetch_file(source(url, size=300_001), tmp_path, lambda *news: told.append(news))
    assert told == []


def test_a_web_page_is_not_the_file(tmp_path: Path, web: Web) -> None:
    url = web.add("a", Page(b"<html>sign in", kind="text/html; charset=utf-8"))
    with pytest.raises(MissingData, match="web page"):
        fetch(tmp_path, url)


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (500, 4), (503, 4), (429, 4)])
def test_an_answer_of_failure_is_believed_or_asked_again(tmp_path: Path, web: Web, status: int, attempts: int) -> None:
    url = web.add("a", Page(DATA, statuses=[status] * 9))
    with pytest.raises(MissingData, match=f"the server answers {status}"):
        fetch(tmp_path, url)
    assert len(web.requests) == attempts


def test_a_passing_failure_passes(tmp_path: Path, web: Web, pauses: list[float]) -> None:
    url = web.add("a", Page(DATA, statuses=[500, 503]))
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert pauses == [1.0, 2.0]


def test_when_all_fails_every_url_is_named_with_its_reason(tmp_path: Path, web: Web) -> None:
    urls = {
        web.add("gone", Page(statuses=[404])): "the server answers 404 Not Found",
        web.add("wrong", Page(OTHER)): "its MD5 is",
        "http://nobody.invalid/set.bin": "is not https",
        "ftp://nobody.invalid/set.bin": "is not https",
        "http://127.0.0.1:1/set.bin": "Connection refused",
    }
    with pytest.raises(MissingData) as error:
        fetch(tmp_path / "folder", *urls, md5=MD5, size=300_000)
    message = str(error.value)
    for url, reason in urls.items():
        assert f"{url}: {reason}" in message
    assert message.startswith("set.bin could not be fetched")
    assert f"by hand (300,000 bytes, MD5 {MD5}) and put it into {tmp_path / 'folder'} under this name" in message
    assert "\n" not in message


def test_a_file_without_address_is_for_the_hand(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"set\.bin could not be fetched: no address is known.*by hand"):
        fetch(tmp_path)


@pytest.mark.parametrize("place", ["http://nobody.invalid/set.bin", "ftp://nobody.invalid/set.bin"])
def test_a_redirect_away_from_https_is_refused(tmp_path: Path, web: Web, place: str) -> None:
    url = web.add("a", Page(location=place))
    with pytest.raises(MissingData, match=f"it leads to {place}, which is not https"):
        fetch(tmp_path, url)


def test_https_may_not_lead_to_plain_http_even_here() -> None:
    asked, headers = download.Request("https://nobody.invalid/set.bin"), HTTPMessage()
    with pytest.raises(download._Unusable, match=r"http://127\.0\.0\.1/a, which is not https"):
        download._Redirects().redirect_request(asked, io.BytesIO(), 302, "Found", headers, "http://127.0.0.1/a")


# ----------------------------------------------------------------------------------------------------------- disk


def test_too_small_a_disk_is_found_before_anything_is_written(
    tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = web.add("a", Page(DATA))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 0, 299_999))
    with pytest.raises(DiskError, match=r"set\.bin: 0\.29 MiB are needed in .* which has 0\.29 MiB free"):
        fetch(tmp_path, url)
    assert files(tmp_path) == ["home"]


def test_a_part_needs_only_what_is_missing(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    url = partly(tmp_path, web, Page(DATA))
    free = 300_000 - part_of(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 0, free))
    assert fetch(tmp_path, url).read_bytes() == DATA


def test_a_disk_that_fills_up_leaves_the_part(tmp_path: Path, web: Web) -> None:
    url = web.add("a", Page(DATA))

    def full(what: str, done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match="no space left"):
        fetch_file(source(url), tmp_path, full)
    start = part_of(tmp_path)
    assert start > 0
    assert fetch(tmp_path, url).read_bytes() == DATA
    assert web.ranges == ["", f"bytes={start}-"]


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="a file stands where a folder is needed"):
        fetch(tmp_path / "file", "https://nobody.invalid/set.bin")


def test_two_at_once_fetch_once(tmp_path: Path, web: Web) -> None:
    url = web.add("a", Page(DATA))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(tmp_path, url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "set.bin"] * 4
    assert len(web.requests) == 1


# ------------------------------------------------------------------------------------------------------- datasets


@pytest.fixture
def packed(tmp_path: Path, web: Web) -> Source:
    """A drawn dataset as an archive on the server."""
    content = write_archive(tmp_path / "birds.tar.gz").read_bytes()
    url = web.add("birds", Page(content))
    return Source("birds.tar.gz", hashlib.md5(content).hexdigest(), (url,), len(content), "waterbirds")


def card(*sources: Source, by_hand: str = "") -> Card:
    return Card(
        name="birds",
        title="",
        classes=("a", "b"),
        attributes=(),
        image=(1, 1, 3),
        counts={},
        licence="",
        citation="",
        recipe=Recipe(),
        backbone="",
        mean=(),
        std=(),
        sources=sources,
        by_hand=by_hand,
    )


def test_a_dataset_is_fetched_and_unpacked(home: Path, web: Web, packed: Source) -> None:
    plain = Source("list.txt", urls=(web.add("list", Page(b"1 2 3")),))
    folder = home / "data/waterbirds"
    told: set[str] = set()
    found = fetch_dataset(card(packed, plain), lambda what, done, total: told.add(what))
    assert found == [folder / "birds", home / "data/downloads/list.txt"]
    assert told == {"fetching birds.tar.gz", "unpacking birds.tar.gz", "fetching list.txt"}
    assert {name: content for name, content in tree(folder).items() if not name.startswith(".")} == TREE
    assert files(folder) == [".fetched-birds.tar.gz", "birds"]
    assert (folder / ".fetched-birds.tar.gz").read_text() == f"{packed.md5} {packed.size}\nbirds"
    web.requests.clear()
    assert fetch_dataset(card(packed, plain), quiet) == found
    assert web.requests == []


def test_the_note_says_what_was_fetched_where_nothing_is_published(home: Path, packed: Source) -> None:
    fetch_dataset(card(replace(packed, md5="", size=0)), quiet)
    note = home / "data/waterbirds/.fetched-birds.tar.gz"
    assert note.read_text().splitlines()[0] == f"{packed.md5} {packed.size}"


@pytest.mark.parametrize("lost", ["tree", "note", "broken note"])
def test_what_was_lost_is_fetched_again(home: Path, web: Web, packed: Source, lost: str) -> None:
    fetch_dataset(card(packed), quiet)
    folder = home / "data/waterbirds"
    if lost == "tree":
        shutil.rmtree(folder / "birds")
    elif lost == "note":
        (folder / ".fetched-birds.tar.gz").unlink()
    else:
        (folder / ".fetched-birds.tar.gz").write_bytes(b"\xff\n")
    assert fetch_dataset(card(packed), quiet) == [folder / "birds"]
    assert len(web.requests) == 2
    assert (folder / "birds/metadata.csv").read_bytes() == TREE["birds/metadata.csv"]


def test_another_archive_of_the_same_name_is_fetched(home: Path, tmp_path: Path, web: Web, packed: Source) -> None:
    fetch_dataset(card(packed), quiet)
    content = write_archive(tmp_path / "new.tar.gz", {"birds/extra.csv": b"new"}).read_bytes()
    web.add("birds", Page(content))
    fetch_dataset(card(replace(packed, md5=hashlib.md5(content).hexdigest(), size=len(content))), quiet)
    assert (home / "data/waterbirds/birds/extra.csv").read_bytes() == b"new"
    assert (home / "data/waterbirds/birds/metadata.csv").exists()


def test_an_archive_that_a_killed_process_left_is_not_fetched_again(home: Path, web: Web, packed: Source) -> None:
    folder = home / "data/waterbirds"
    folder.mkdir(parents=True)
    (folder / "birds.tar.gz").write_bytes(web.pages["birds"].content)  # killed before it was unpacked
    fetch_dataset(card(packed), quiet)
    assert files(folder) == [".fetched-birds.tar.gz", "birds"]
    (folder / "birds.tar.gz").write_bytes(web.pages["birds"].content)  # killed before it was deleted
    fetch_dataset(card(packed), quiet)
    assert files(folder) == [".fetched-birds.tar.gz", "birds"]
    assert web.requests == []


def test_an_archive_that_cannot_be_unpacked_is_kept_and_named(home: Path, web: Web) -> None:
    url = web.add("a", Page(b"not an archive"))
    with pytest.raises(CorruptFile, match=r"birds\.tar: broken or truncated.*Delete it and fetch it again"):
        fetch_dataset(card(Source("birds.tar", urls=(url,), into="waterbirds")), quiet)
    assert files(home / "data/waterbirds") == ["birds.tar"]
    assert not list(home.rglob(f"{TEMPORARY}*"))


def test_what_no_program_may_fetch_is_said(home: Path, web: Web, packed: Source) -> None:
    with pytest.raises(MissingData, match="birds: the licence must be signed"):
        fetch_dataset(card(packed, by_hand="the licence must be signed"), quiet)
    assert web.requests == []


def test_a_source_without_address_is_asked_for_before_anything_is_fetched(
    home: Path, tmp_path: Path, web: Web, packed: Source
) -> None:
    hand = Source("hand.zip", into="by/hand")
    with pytest.raises(MissingData, match=r"hand\.zip could not be fetched.*put it into .*by/hand"):
        fetch_dataset(card(packed, hand), quiet)
    assert web.requests == []
    write_archive(home / "data/by/hand/hand.zip")
    found = [home / "data/waterbirds/birds", home / "data/by/hand/birds"]
    assert fetch_dataset(card(packed, hand), quiet) == found
    assert (home / "data/by/hand/hand.zip").exists()  # it cannot be fetched again
    (home / "data/by/hand/hand.zip").unlink()
    assert fetch_dataset(card(packed, hand), quiet) == found
