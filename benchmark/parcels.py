"""What travels between machines without a common file system: the store that a run reads, and the record it makes.

Both are checked where they arrive. A store is taken apart into handles, which `put` makes of bytes and arrays and `get`
resolves, so that this file knows nothing of how they travel.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from . import record
from .errors import CorruptFile, UserError, one_line
from .home import data_home, lock, runs_home, write_bytes, write_folder
from .planning import weights_identity
from .pools import IMAGES, WHOLE, ensure_pool, has_pool, open_pool, pool_path
from .record import RunRecord
from .runner import finished
from .spec import Block, RunSpec
from .store import Store, check_labels

MOST = 4 * 2**30
"""Bytes of pixels that are sent: a store of more is to be prepared where it is needed, or to lie on a common disk."""
MANIFEST = "manifest.json"

Put = Callable[[Any], Any]
Get = Callable[[Any], Any]


class StoreParcel(TypedDict):
    """A store: its folder's name, its files, and by key its pools' manifests with the chunks of pixels (n, h, w, c)."""

    folder: str
    files: dict[str, Any]
    pools: dict[str, tuple[bytes, list[Any]]]


class _Manifest(BaseModel):
    fingerprint: str


class _Pool(BaseModel):
    shape: tuple[int, ...]
    dtype: str
    step: int


# ---------------------------------------------------------------------------------------------------------- stores


def local_store(store: Store) -> Store | None:
    """The store with the same fingerprint in this home, if it and its pixels are there."""
    if not all(has_pool(key) for key in store.pools.values()):
        return None
    for manifest in sorted((data_home() / "store").glob(f"*/{MANIFEST}")):
        try:
            found = _Manifest.model_validate_json(manifest.read_bytes())
        except (ValidationError, OSError):  # another store, which is no concern of this run
            continue
        if found.fingerprint == store.fingerprint:
            return replace(store, path=manifest.parent)
    return None


def pack_store(store: Store, put: Put) -> StoreParcel:
    """Take a store apart; raises `UserError` for one with more than `MOST` bytes of pixels."""
    keys = sorted(set(store.pools.values()))
    size = sum((pool_path(key) / IMAGES).stat().st_size for key in keys)
    if size > MOST:
        raise UserError(
            f"{store.card.name}: a node lacks its {size / 2**30:.1f} GiB of pixels, and more than {MOST >> 30} GiB are "
            f"not sent. Run `worstgroup prepare {store.card.name.partition('[')[0]}` on every node, with the same "
            "--root and settings, or let WORSTGROUP_HOME be a folder that all nodes share."
        )
    return {
        "folder": store.path.name,
        "files": {path.name: put(path.read_bytes()) for path in sorted(store.path.iterdir()) if path.is_file()},
        "pools": {key: _pack_pool(key, put) for key in keys},
    }


def unpack_store(parcel: StoreParcel, store: Store, get: Get) -> Store:
    """Put a store together in this home; raises `CorruptFile` when it is not, bit for bit, what was sent."""
    for key, (manifest, chunks) in parcel["pools"].items():
        _unpack_pool(key, manifest, _Chunks(chunks, manifest, get), store.card.name)
    path = data_home() / "store" / parcel["folder"]

    def fill(folder: Path) -> None:
        for name, content in parcel["files"].items():
            (folder / name).write_bytes(get(content))

    with lock(path):
        if not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)  # a folder without a manifest is no store
            write_folder(path, fill, MANIFEST)
    found = replace(store, path=path)
    problem = check_labels(found)
    if problem:
        raise CorruptFile(problem)
    return found


def _pack_pool(key: str, put: Put) -> tuple[bytes, list[Any]]:
    """Manifest of a pool and its chunks, each of which has its SHA-256 there."""
    manifest, images = (pool_path(key) / WHOLE).read_bytes(), open_pool(key)
    step = _Pool.model_validate_json(manifest).step
    starts = range(0, len(images), step)
    return manifest, [put(np.ascontiguousarray(images[start : start + step])) for start in starts]


def _unpack_pool(key: str, manifest: bytes, source: "_Chunks", what: str) -> None:
    pool = _Pool.model_validate_json(manifest)
    path = ensure_pool(source, key, pool.shape[1:], pool.dtype, what, lambda what, done, total: None)
    if (path / WHOLE).read_bytes() != manifest:
        raise CorruptFile(f"{path}: not the pixels that were sent; delete the folder, they are sent again.")


class _Chunks:
    """Pixels that arrive chunk by chunk, an `ImageSource`."""

    def __init__(self, chunks: list[Any], manifest: bytes, get: Get) -> None:
        pool = _Pool.model_validate_json(manifest)
        self._chunks, self._get, self._length, self._step = chunks, get, pool.shape[0], pool.step

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> NDArray[Any]:
        pixels: NDArray[Any] = self._get(self._chunks[index.start // self._step])
        return pixels


# --------------------------------------------------------------------------------------------------------- weights


def local_weights(block: Block) -> Block | None:
    """The block with its file of initial weights where this machine has it; None where it has none like it."""
    if not block.weights_file:
        return block
    for path in (Path(block.weights_file), _weights_path(block)):
        if weights_identity(str(path)) == (block.weights, str(path.resolve())):
            return replace(block, weights_file=str(path))
    return None


def unpack_weights(content: bytes, block: Block) -> Block:
    """Write a file of initial weights into this home; raises `CorruptFile` when it is not the block's."""
    write_bytes(_weights_path(block), content)
    found = local_weights(block)
    if found is None:
        raise CorruptFile(f"{_weights_path(block)}: not the weights {block.weights} that were sent")
    return found


def _weights_path(block: Block) -> Path:
    return data_home() / "weights" / block.weights / Path(block.weights_file).name


# --------------------------------------------------------------------------------------------------------- records


def candidates_of(spec: RunSpec) -> dict[str, bytes]:
    """Records of the candidates of a run's search, by file name, as far as they are there."""
    path = record.record_path(runs_home(), spec)
    found = (record.find_run(path, run) for run in spec.candidates)
    return {place.name: place.read_bytes() for place in found if place is not None}


def packed_record(path: Path, made: RunRecord) -> tuple[bytes, bytes | None]:
    """The JSON of a record, and its predictions where it has any."""
    return made.to_json(), record.predictions_path(path).read_bytes() if made.status == "finished" else None


def gather(spec: RunSpec, content: bytes, packed: bytes | None) -> RunRecord:
    """Check a record that came from elsewhere and write it into this home, unless the run is finished there.

    Raises `CorruptFile` for a record of another run, or with other predictions than its own.
    """
    what = f"{spec.label}: the record that came back"
    try:
        found = RunRecord.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise CorruptFile(f"{what} is not valid: {one_line(str(error.errors()[0]['msg']))}") from error
    if not found.run == spec.hash == found.identity_hash():
        raise CorruptFile(f"{what} is of another run, {found.run[:12]}")
    sha = found.predictions.sha256 if found.predictions else ""
    if sha != (hashlib.sha256(packed).hexdigest() if packed is not None else ""):
        raise CorruptFile(f"{what} does not have its own predictions")
    path = record.record_path(runs_home(), spec)
    with lock(path):
        done = finished(spec)
        if done is None:
            record.write(path, found, packed)
    return done or found
