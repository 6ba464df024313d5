"""Pixel pools: every picture of a dataset decoded once into one memory-mapped .npy file, shared by all its variants.

A pool lies under `$WORSTGROUP_HOME/data/pixels/` and is keyed by what its pixels are made from. It is written chunk by
chunk into a temporary folder with the SHA-256 of each chunk beside it, so that a killed build goes on where it stopped,
and appears under its name when it is whole.
"""

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from .errors import CorruptFile
from .home import TEMPORARY, check_space, data_home, disk_errors, lock, write_bytes
from .machine import cores
from .spec import digest

VERSION = 1
CHUNK_BYTES = 2**25

Report = Callable[[str, int, int], None]
"""Told (what, done, total) while pictures are decoded."""
IMAGES, WHOLE, _JOURNAL = "images.npy", "pool.json", "chunks.txt"


class ImageSource(Protocol):
    """Decoded pixels: `len()` images, and slices of them as (n, h, w, c). A NumPy array is one.

    A source that knows its identity without decoding has an attribute `key`.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> NDArray[Any]: ...


class _Manifest(BaseModel):
    shape: tuple[int, ...]
    dtype: str
    step: int = Field(gt=0)
    """Images of a chunk."""
    chunks: list[str]


def pool_key(source: ImageSource, image: tuple[int, ...], dtype: str, what: str) -> str:
    """Identity of a source's pixels: what it says itself, else the SHA-256 of all of them."""
    own = getattr(source, "key", None)
    if own is None:
        content = hashlib.sha256()
        step = _chunk(image, dtype)
        for start in range(0, len(source), step):
            content.update(_pixels(source, start, min(start + step, len(source)), image, dtype, what).data)
        own = content.hexdigest()
    return digest([VERSION, own, len(source), image, dtype])[:24]


def ensure_pool(source: ImageSource, key: str, image: tuple[int, ...], dtype: str, what: str, report: Report) -> Path:
    """The folder of a pool, which is built first if need be; raises `CorruptFile` or `DiskError`."""
    path = pool_path(key)
    if not has_pool(key):
        with lock(path):
            if not has_pool(key):
                _build(path, source, (len(source), *image), dtype, what, report)
    return path


def pool_path(key: str) -> Path:
    """Where a pool lies."""
    return data_home() / "pixels" / key


def has_pool(key: str) -> bool:
    """Whether a pool was built."""
    return (pool_path(key) / WHOLE).exists()


def open_pool(key: str) -> NDArray[Any]:
    """Memory-mapped images (n, h, w, c), read-only: of a writable map Linux wants to know that it fits into memory.

    Raises `CorruptFile`.
    """
    path = pool_path(key)
    try:
        manifest = _Manifest.model_validate_json((path / WHOLE).read_bytes())
        images = np.lib.format.open_memmap(path / IMAGES, mode="r")
    except (ValidationError, OSError, ValueError) as error:
        raise CorruptFile(f"{path}: not a whole pool of pixels; delete the folder, it is rebuilt.") from error
    if images.shape != manifest.shape or str(images.dtype) != manifest.dtype:
        raise CorruptFile(f"{path / IMAGES}: not what {WHOLE} says; delete the folder, it is rebuilt.")
    return cast(NDArray[Any], images)


def _chunk(image: tuple[int, ...], dtype: str) -> int:
    """Images of a chunk."""
    return max(1, CHUNK_BYTES // (int(np.prod(image)) * np.dtype(dtype).itemsize))


def _pixels(source: ImageSource, start: int, stop: int, image: tuple[int, ...], dtype: str, what: str) -> NDArray[Any]:
    """Images `start` to `stop` in the pool's type; raises `CorruptFile` for others than were declared."""
    found, expected = np.asarray(source[start:stop]), (stop - start, *image)
    if found.shape != expected:
        raise CorruptFile(f"{what}: images {start} to {stop} have shape {found.shape}, the card says {expected}")
    if not np.can_cast(found.dtype, dtype, "same_kind"):  # a cast would wrap 256 to 0, and 0.9 to 0
        raise CorruptFile(f"{what}: images {start} to {stop} are {found.dtype}, the card says {dtype}")
    return np.ascontiguousarray(found, dtype=dtype)


def _build(path: Path, source: ImageSource, shape: tuple[int, ...], dtype: str, what: str, report: Report) -> None:
    """Write the pool; a build that was killed left its chunks, one that failed leaves nothing."""
    work = path.with_name(f"{TEMPORARY}{path.name}")
    with disk_errors(path):
        try:
            work.mkdir(parents=True, exist_ok=True)
            written = (work / IMAGES).stat().st_size if (work / IMAGES).exists() else 0
            need = int(np.prod(shape)) * np.dtype(dtype).itemsize - written
            check_space(path.parent, need, f"the pixels of {what}")
            chunks = _write(work, source, shape, dtype, what, report)
            manifest = _Manifest(shape=shape, dtype=dtype, step=_chunk(shape[1:], dtype), chunks=chunks)
            (work / _JOURNAL).unlink()
            write_bytes(work / WHOLE, manifest.model_dump_json().encode())
            shutil.rmtree(path, ignore_errors=True)  # a folder without a manifest is no pool
            work.replace(path)
        except Exception:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _write(work: Path, source: ImageSource, shape: tuple[int, ...], dtype: str, what: str, report: Report) -> list[str]:
    """Write all chunks that are not there yet; returns the SHA-256 of every chunk.

    Not through a memory map: on a full disk that ends in SIGBUS, not in an error.
    """
    step, size = _chunk(shape[1:], dtype), int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
    journal = work / _JOURNAL
    with (work / IMAGES).open("r+b" if (work / IMAGES).exists() else "w+b") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        )
        file.flush()
        known = journal.read_text(errors="replace").split() if journal.exists() else []
        chunks: list[str] = []
        for sha in known:
            content = file.read(min(step, shape[0] - len(chunks) * step) * size)
            if hashlib.sha256(content).hexdigest() != sha:
                file.seek(-len(content), os.SEEK_CUR)
                break
            chunks.append(sha)
        file.truncate()
        journal.write_text("".join(f"{sha}\n" for sha in chunks))
        starts = range(len(chunks) * step, shape[0], step)
        with journal.open("a") as notes, closing(_ahead(source, starts, shape, dtype, what)) as decoded:
            report(f"decoding {what}", starts.start, shape[0])
            for start, pixels in zip(starts, decoded, strict=True):
                file.write(pixels.data)
                file.flush()
                chunks.append(hashlib.sha256(pixels.data).hexdigest())
                notes.write(chunks[-1] + "\n")
                notes.flush()
                report(f"decoding {what}", start + len(pixels), shape[0])
        os.fsync(file.fileno())
    return chunks


def _ahead(
    source: ImageSource, starts: range, shape: tuple[int, ...], dtype: str, what: str
) -> Generator[NDArray[Any], None, None]:
    """Chunks in order; the next one is decoded while one is hashed and written."""

    def chunk(start: int) -> NDArray[Any]:
        return _pixels(source, start, min(start + starts.step, shape[0]), shape[1:], dtype, what)

    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(chunk, start) for start in starts[:1])
        for start in starts:
            pixels = waiting.popleft().result()
            if start + starts.step in starts:
                waiting.append(thread.submit(chunk, start + starts.step))
            yield pixels


def check_pool(key: str) -> str:
    """What is wrong with a pool's bytes, empty when every chunk has the SHA-256 that it was written with."""
    path = pool_path(key)
    images = open_pool(key)
    manifest = _Manifest.model_validate_json((path / WHOLE).read_bytes())
    starts = range(0, len(images), manifest.step)

    def same(start: int, sha: str) -> bool:
        return hashlib.sha256(np.ascontiguousarray(images[start : start + manifest.step]).data).hexdigest() == sha

    if len(starts) != len(manifest.chunks):
        return f"{path / WHOLE}: was altered; delete the folder, it is rebuilt."
    with ThreadPoolExecutor(cores()) as threads:  # hashing leaves the interpreter's lock
        for start, sound in zip(starts, threads.map(same, starts, manifest.chunks), strict=True):
            if not sound:
                stop = min(start + manifest.step, len(images))
                return f"{path / IMAGES}: images {start} to {stop} were altered; delete the folder, it is rebuilt."
    return ""


def ensure_sound(key: str) -> None:
    """Raise `CorruptFile` for a pool whose bytes have changed; a process looks once at each that stays as it is."""
    file = pool_path(key) / IMAGES
    status = file.stat()
    if problem := _problem(key, (file, status.st_size, status.st_mtime_ns)):
        raise CorruptFile(problem)


@lru_cache(maxsize=1024)
def _problem(key: str, stamp: tuple[object, ...]) -> str:
    """What `check_pool` says; `stamp` tells one state of the file from another."""
    return check_pool(key)
