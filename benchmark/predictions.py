"""Predictions as bytes: arrays to a compressed .npz and back, without trust in what it holds."""

import hashlib
import io
import math
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
UNPACKED = 2**31
"""Bytes that predictions may have in memory; those of a million images and a hundred classes are fewer."""


def pack(arrays: Arrays) -> bytes:
    """Compress arrays; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)),
                content.getvalue(),
                zipfile.ZIP_DEFLATED,
            )
    return buffer.getvalue()


def unpack(content: bytes, part: str = "") -> Arrays:
    """Arrays that `pack` wrote, all or those whose name begins with `part`.

    Raises whatever zip, zlib and NumPy do for forged content, and `ValueError` for what would fill the memory.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > UNPACKED:
            raise ValueError(f"it would be larger than {UNPACKED >> 30} GiB")
        names = [name for name in archive.namelist() if name.startswith(part)]
        return {name.removesuffix(".npy"): _array(archive.read(name)) for name in names}


def _array(content: bytes) -> NDArray[Any]:
    """An array as `pack` wrote it; that it is as long as it says is seen before room is made for it."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another version of the format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError("an array is not as long as it says")
    array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def labels_hash(y: NDArray[Any], a: NDArray[Any]) -> str:
    """SHA-256 of labels and attributes as int64."""
    return hashlib.sha256(y.astype(np.int64).tobytes() + np.ascontiguousarray(a, dtype=np.int64).tobytes()).hexdigest()
