"""Pixel pools: built in chunks, resumed after a kill, whole or not there, and told when they are damaged."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from worstgroup.benchmark import pools
from worstgroup.benchmark.data import Pixels
from worstgroup.benchmark.errors import CorruptFile, DiskError
from worstgroup.benchmark.home import TEMPORARY, data_home
from worstgroup.benchmark.pools import check_pool, ensure_pool, has_pool, open_pool, pool_key, pool_path

IMAGE = (8, 8, 3)
N, PER_CHUNK = 23, 5
CHUNKS = [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *IMAGE), dtype=np.uint8)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "CHUNK_BYTES", PER_CHUNK * 8 * 8 * 3)


class Source:
    """Images that know their key; notes what it is asked for, and breaks at one of the slices."""

    key = "drawn"

    def __init__(self, images: np.ndarray = IMAGES, breaks: int = -1, error: BaseException | None = None) -> None:
        self.images, self.breaks, self.error = images, breaks, error or KeyboardInterrupt()
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> np.ndarray:
        if len(self.asked) == self.breaks:
            raise self.error
        self.asked.append((index.start, index.stop))
        return self.images[index]


def key_of(source: Any, image: tuple[int, ...] = IMAGE, dtype: str = "uint8") -> str:
    return pool_key(source, image, dtype, "drawn")


def build(source: Any, told: list[Any] | None = None) -> str:
    """Ensure a source's pool; its key."""
    key = key_of(source)
    report = (lambda *progress: None) if told is None else (lambda *progress: told.append(progress))
    ensure_pool(source, key, IMAGE, "uint8", "drawn", report)
    return key


def left() -> list[str]:
    """Everything in the folder of the pools, hidden things included."""
    return sorted(path.name for path in (data_home() / "pixels").rglob("*"))


def partial(key: str) -> Path:
    return pool_path(key).with_name(f"{TEMPORARY}{key}")


def interrupted(chunks: int) -> str:
    """Build a pool that is killed after some chunks; its key."""
    source = Source(breaks=chunks)
    with pytest.raises(KeyboardInterrupt):
        build(source)
    assert not has_pool(key_of(source))
    return key_of(source)


# ------------------------------------------------------------------------------------------------------------ building


def test_a_pool_is_written_chunk_by_chunk_and_read_back() -> None:
    source, told = Source(), list[Any]()
    key = build(source, told)
    assert source.asked == CHUNKS
    assert told == [("decoding drawn", done, N) for done in (0, *(stop for _, stop in CHUNKS))]
    assert np.array_equal(open_pool(key), IMAGES)
    assert np.array_equal(np.load(pool_path(key) / "images.npy"), IMAGES)  # a plain .npy
    assert left() == sorted([key, "images.npy", "pool.json"])
    assert check_pool(key) == ""
    build(source)
    assert source.asked == CHUNKS


def test_an_opened_pool_takes_no_writes() -> None:
    key = build(IMAGES)
    with pytest.raises(ValueError, match="read-only"):
        open_pool(key)[:] = 0
    assert np.array_equal(open_pool(key), IMAGES)


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="asks how much memory there is")
def test_a_pool_larger_than_memory_is_opened() -> None:
    """Of CelebA at 224 px, 28 GiB, on a machine with less."""
    key, size = build(IMAGES), 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    folder = pool_path(key)
    with (folder / "images.npy").open("wb") as file:  # with a hole in it, which takes no space
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (size, 1, 1, 1)})
        file.truncate(file.tell() + size)
    manifest = json.loads((folder / "pool.json").read_text())
    (folder / "pool.json").write_text(json.dumps({**manifest, "shape": [size, 1, 1, 1]}))
    pixels = Pixels(open_pool(key), np.arange(2), (0.0,), (1.0,), torch.device("cpu"), rows=np.array([0, size - 1]))
    assert pixels.batch(torch.arange(2)).x.tolist() == [[[[0.0]]], [[[0.0]]]]


def test_features_are_kept_as_float32() -> None:
    features = np.random.default_rng(0).normal(size=(N, 1, 1, 6))
    key = key_of(features, (1, 1, 6), "float32")
    ensure_pool(features, key, (1, 1, 6), "float32", "drawn", lambda *progress: None)
    assert open_pool(key).dtype == np.float32
    assert np.array_equal(open_pool(key), features.astype(np.float32))


def test_an_array_is_known_by_its_pixels_and_a_source_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    other = IMAGES.copy()
    other[-1, -1, -1, -1] ^= 1
    before = key_of(IMAGES)
    assert key_of(IMAGES.copy()) == before != key_of(other)
    assert key_of(Source()) == key_of(Source(other)) != before
    assert len({before, key_of(IMAGES[:-1]), key_of(IMAGES.reshape(N, 4, 16, 3), (4, 16, 3))}) == 3
    monkeypatch.setattr(pools, "CHUNK_BYTES", 2**20)
    assert key_of(IMAGES) == before  # whatever the chunks


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((N, 8, 8), np.uint8), r"drawn: images 0 to 5 have shape \(5, 8, 8\), the card says \(5, 8, 8, 3\)"),
        (np.zeros((N, 9, 8, 3), np.uint8), r"shape \(5, 9, 8, 3\)"),
        (np.full((N, *IMAGE), 0.9), "drawn: images 0 to 5 are float64, the card says uint8"),
        (np.full((N, *IMAGE), 256), "are int64"),
    ],
)
@pytest.mark.parametrize("lazy", [True, False])
def test_other_images_than_declared_are_refused(images: np.ndarray, says: str, lazy: bool) -> None:
    with pytest.raises(CorruptFile, match=says):
        build(Source(images) if lazy else images)
    assert left() == []


def test_a_source_that_gives_fewer_images_is_refused() -> None:
    class Short(Source):
        def __len__(self) -> int:
            return N + 2

    with pytest.raises(CorruptFile, match=r"images 20 to 25 have shape \(3, 8, 8, 3\), the card says \(5, 8, 8, 3\)"):
        build(Short())
    assert left() == []


def test_a_large_source_does_not_pile_up_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, n = 2**21, 400
    monkeypatch.setattr(pools, "CHUNK_BYTES", chunk)

    class Drawing(Source):
        def __len__(self) -> int:
            return n

        def __getitem__(self, index: slice) -> np.ndarray:
            return np.full((index.stop - index.start, 224, 224, 3), index.start % 256, np.uint8)

    source, image = Drawing(), (224, 224, 3)
    key = key_of(source, image)
    tracemalloc.start()
    try:
        ensure_pool(source, key, image, "uint8", "drawn", lambda *progress: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (pool_path(key) / "images.npy").stat().st_size > 28 * chunk
    assert peak < 3.5 * chunk


# -------------------------------------------------------------------------------------------------------------- kills


def test_a_build_that_was_killed_before_its_last_word_decodes_nothing() -> None:
    key = build(Source())
    path, work = pool_path(key), partial(key)
    path.rename(work)
    (work / "chunks.txt").write_text("\n".join(json.loads((work / "pool.json").read_text())["chunks"]))
    (work / "pool.json").unlink()
    again = Source()
    assert build(again) == key
    assert again.asked == []
    assert np.array_equal(open_pool(key), IMAGES)


@pytest.mark.parametrize("done", range(5))
def test_a_killed_build_goes_on_where_it_stopped(done: int) -> None:
    key = interrupted(done)
    again, told = Source(), list[Any]()
    assert build(again, told) == key
    assert again.asked == CHUNKS[done:]
    assert [progress[1] for progress in told[1:]] == [stop for _, stop in CHUNKS[done:]]
    assert np.array_equal(open_pool(key), IMAGES)
    assert check_pool(key) == ""
    assert left() == sorted([key, "images.npy", "pool.json"])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


CHUNK = PER_CHUNK * 8 * 8 * 3
HEADER = 128


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (lambda work: flip(work / "images.npy", HEADER + CHUNK + 3), 1),
        (lambda work: flip(work / "images.npy", 20), 3),  # the header is written anew
        (lambda work: (work / "images.npy").write_bytes((work / "images.npy").read_bytes()[:-1]), 2),
        (lambda work: (work / "images.npy").write_bytes((work / "images.npy").read_bytes() + bytes(100)), 3),
        (lambda work: (work / "images.npy").write_bytes(b""), 0),
        (lambda work: (work / "images.npy").unlink(), 0),
        (lambda work: (work / "chunks.txt").unlink(), 0),
        (lambda work: (work / "chunks.txt").write_bytes(b"\xff\xfe nonsense"), 0),
        (lambda work: (work / "chunks.txt").write_text((work / "chunks.txt").read_text()[:-9]), 2),
        (lambda work: (work / "chunks.txt").write_text((work / "chunks.txt").read_text() * 3), 3),
    ],
)
def test_damage_to_what_a_killed_build_left_is_made_good(harm: Any, kept: int) -> None:
    key = interrupted(3)
    harm(partial(key))
    again = Source()
    build(again)
    assert again.asked == CHUNKS[kept:]
    assert np.array_equal(open_pool(key), IMAGES)
    assert check_pool(key) == ""


def test_a_build_that_is_killed_twice() -> None:
    interrupted(1)
    key = interrupted(2)  # two more chunks
    again = Source()
    build(again)
    assert again.asked == CHUNKS[3:]
    assert np.array_equal(open_pool(key), IMAGES)


BUILDER = """
import os, sys, time
import numpy as np
from worstgroup.benchmark import pools

class Slow:
    key = "slow"
    def __len__(self): return 20
    def __getitem__(self, index):
        with open(sys.argv[1], "a") as log:
            log.write(f"{index.start}\\n")
        time.sleep(0.02)
        if index.start == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        return np.full((index.stop - index.start, 8, 8, 3), index.start, np.uint8)

pools.CHUNK_BYTES = 2 * 8 * 8 * 3
source = Slow()
pools.ensure_pool(source, pools.pool_key(source, (8, 8, 3), "uint8", "slow"), (8, 8, 3), "uint8", "slow", print)
"""


def start(log: Path, dies_at: int = -1) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(log), str(dies_at)], stdout=subprocess.DEVNULL)


def test_two_processes_build_a_pool_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [start(log) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert log.read_text().split() == [str(start) for start in range(0, 20, 2)]


def test_another_process_takes_over_from_one_that_died(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert start(log, dies_at=12).wait(60) == -signal.SIGKILL
    assert start(log).wait(60) == 0
    assert log.read_text().split() == [str(start) for start in [*range(0, 14, 2), *range(12, 20, 2)]]
    (pool,) = (data_home() / "pixels").iterdir()
    assert np.array_equal(open_pool(pool.name)[:, 0, 0, 0], np.arange(20) // 2 * 2)


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("a bug"), ValueError),
        (CorruptFile("broken JPEG"), CorruptFile),
        (OSError(28, "No space left on device"), DiskError),
        (MemoryError(), MemoryError),
    ],
)
def test_a_failed_build_leaves_nothing(error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised):
        build(Source(breaks=2, error=error))
    assert left() == []
    assert np.array_equal(open_pool(build(Source())), IMAGES)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk whose `free` bytes a test may set."""
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return usage


def test_too_small_a_disk_is_told_before_anything_is_decoded(disk: SimpleNamespace, home: Path) -> None:
    source = Source()
    disk.free = IMAGES.nbytes - 1
    with pytest.raises(
        DiskError, match=r"the pixels of drawn: .* MiB are needed in .* Free some space, or set"
    ) as error:
        build(source)
    assert str(home) in str(error.value)
    assert source.asked == []
    assert left() == []
    disk.free += 1
    build(source)


def test_a_resumed_build_needs_room_for_the_rest_only(disk: SimpleNamespace) -> None:
    disk.free = 2**40
    key = interrupted(3)
    disk.free = 2 * CHUNK
    build(Source())
    assert np.array_equal(open_pool(key), IMAGES)


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>"),
        lambda path: path.unlink(),
        lambda path: np.save(path, IMAGES[:-1]),
        lambda path: np.save(path, IMAGES.astype(np.int16)),
        lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
        lambda path: path.with_name("pool.json").write_text("{}"),
        lambda path: path.with_name("pool.json").write_bytes(b"\xff"),
        lambda path: path.with_name("pool.json").unlink(),
    ],
)
def test_a_pool_that_is_not_whole_is_refused(harm: Any) -> None:
    key = build(IMAGES)
    harm(pool_path(key) / "images.npy")
    with pytest.raises(CorruptFile, match="delete the folder, it is rebuilt") as error:
        open_pool(key)
    assert str(pool_path(key)) in str(error.value)
    shutil.rmtree(pool_path(key))
    assert np.array_equal(open_pool(build(IMAGES)), IMAGES)


@pytest.mark.parametrize("image", [0, 9, 10, N - 1])
def test_one_altered_byte_is_found(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = build(IMAGES)
    flip(pool_path(key) / "images.npy", HEADER + image * 8 * 8 * 3 + 17)
    monkeypatch.setattr(pools, "CHUNK_BYTES", 7 * CHUNK)  # the pool knows how it was cut
    first, last = next((a, b) for a, b in CHUNKS if a <= image < b)
    assert check_pool(key) == (
        f"{pool_path(key) / 'images.npy'}: images {first} to {last} were altered; delete the folder, it is rebuilt."
    )


def test_the_manifest_holds_the_hash_of_every_chunk() -> None:
    manifest = pools._Manifest.model_validate_json((pool_path(build(IMAGES)) / "pool.json").read_bytes())
    assert manifest.shape == IMAGES.shape
    assert manifest.step == PER_CHUNK
    assert manifest.chunks == [hashlib.sha256(IMAGES[a:b].tobytes()).hexdigest() for a, b in CHUNKS]
