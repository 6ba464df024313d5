"""The idx format, and the four MNIST files: where they may lie, how they are read, fetched and told apart.

idx is a big-endian magic number (2051 for pictures, 2049 for labels), the size of each axis as 32 bits, then the bytes.
"""

import gzip
import hashlib
import math
import socket
import zlib
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.home import TEMPORARY, data_home, disk_errors, lock
from ..benchmark.spec import digest
from ..benchmark.store import search

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST: dict[str, tuple[str, str]] = {
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}
"""File name to the MD5 of the official .gz and of its unpacked content."""

_AXES = {2049: 1, 2051: 3}
_GZIP = b"\x1f\x8b"
_FOLDERS = ("MNIST/raw", "raw", "")
_REPLACE = "Replace it by the official file."
_PATIENCE = 30.0


class Digits(NamedTuple):
    """Pictures (n, 28, 28) uint8 and their digits (n,) uint8, 0 to 9; both read-only."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


# ---------------------------------------------------------------------------------------------------------- reading


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file, gzipped or not, as a read-only array: (n, rows, cols) pictures or (n,) labels.

    Raises `CorruptFile`, which names the path, for a broken gzip, a foreign file, a truncated one and trailing bytes.
    """
    content = _unpack(path)
    magic = int.from_bytes(content[:4], "big")
    if len(content) < 4 or magic not in _AXES:
        raise CorruptFile(
            f"{path}: not an idx file of MNIST: it starts with {content[:4].hex(' ') or 'nothing'}, "
            f"not with the number 2049 (labels) or 2051 (pictures). {_REPLACE}"
        )
    start = 4 + 4 * _AXES[magic]
    if len(content) < start:
        raise CorruptFile(f"{path}: truncated within its header, {len(content)} of {start} bytes. {_REPLACE}")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    declared, found = math.prod(shape), len(content) - start
    if found != declared:
        problem = "truncated" if found < declared else "too long"
        raise CorruptFile(
            f"{path}: {problem}: its header declares {'x'.join(map(str, shape))} = {declared} bytes, "
            f"{found} follow. {_REPLACE}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_mnist(files: dict[str, Path]) -> tuple[Digits, Digits]:
    """Read the four files that `find_mnist` found: the train part, then the t10k part.

    Raises `CorruptFile` when a file is broken, or pictures and labels do not belong together.
    """
    return _read_part(files, "train"), _read_part(files, "t10k")


def mnist_key(files: dict[str, Path]) -> str:
    """Identity of the four files by the MD5 of what lies on disk (0.03 s for the .gz, 0.1 s unpacked).

    The official files have one key, packed or not. A file with an unknown MD5, such as a re-packed .gz, counts by its
    own; whether it holds the official digits is for the card's counts to say.
    """
    parts = []
    for name, official in MNIST.items():
        found = hashlib.md5(_content(files[name]), usedforsecurity=False).hexdigest()
        parts.append(official[1] if found in official else found)
    return digest(parts)


def _read_part(files: dict[str, Path], part: str) -> Digits:
    pictures, digits = files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"]
    images, labels = read_idx(pictures), read_idx(digits)
    if images.shape[1:] != (28, 28):
        raise CorruptFile(f"{pictures}: holds an array of shape {images.shape}, not pictures of 28x28. {_REPLACE}")
    if labels.ndim != 1 or labels.max(initial=0) > 9:
        raise CorruptFile(f"{digits}: holds something else than labels from 0 to 9. {_REPLACE}")
    if len(images) != len(labels):
        raise CorruptFile(
            f"{pictures} holds {len(images)} pictures, {digits} {len(labels)} labels: they do not belong together. "
            "Replace both by the official files."
        )
    return Digits(images, labels)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptFile(f"{path}: cannot be read: {error.strerror or error}") from error


def _unpack(path: Path) -> bytes:
    """Content of a file, unpacked where it is gzip: its bytes decide, browsers unpack a .gz and keep its name."""
    content = _content(path)
    if not content.startswith(_GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptFile(f"{path}: broken or truncated gzip ({error}). {_REPLACE}") from error


# ---------------------------------------------------------------------------------------------------------- finding


def find_mnist(root: Path | None) -> dict[str, Path]:
    """Find the four files, each as `NAME.gz` or `NAME`, in one folder.

    Raises `MissingData` that says what to put where.
    """
    found = _look(root)
    if not found:
        raise MissingData(_advice(root))
    return found


def fetch_mnist() -> dict[str, Path]:
    """Fetch the four .gz into `$WORSTGROUP_HOME/data/mnist/MNIST/raw`; raises `MissingData` when that fails.

    They arrive in a temporary folder and are renamed one by one, so that only whole files are ever found, and files
    that already lie in the folder are no obstacle.
    """
    target = data_home() / "mnist" / "MNIST" / "raw"
    with lock(data_home() / "mnist"):
        return _look(None) or _fetch(target)


def _fetch(target: Path) -> dict[str, Path]:
    fetched = {name: target / f"{name}.gz" for name in MNIST}
    try:
        with disk_errors(target):
            data_home().mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=TEMPORARY, dir=data_home(), ignore_cleanup_errors=True) as temporary:
                download(Path(temporary))
                target.mkdir(parents=True, exist_ok=True)
                for path in fetched.values():
                    (Path(temporary) / "MNIST" / "raw" / path.name).replace(path)
    except (ImportError, OSError, RuntimeError, HTTPException) as error:
        raise MissingData(_advice(None, reason=" ".join(str(error).split()))) from error
    return fetched


def download(folder: Path) -> None:
    """Let torchvision fetch MNIST into `folder/MNIST/raw` and check the MD5 of each file."""
    from torchvision.datasets import MNIST as TorchvisionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)  # torchvision sets none: behind a silent firewall it would wait for minutes
    try:
        TorchvisionMNIST(folder, download=True)
    finally:
        socket.setdefaulttimeout(before)


def _folders(root: Path | None) -> list[Path]:
    return [folder / inner for folder in search("mnist", root, what="MNIST") for inner in _FOLDERS]


def _present(folder: Path) -> dict[str, Path]:
    """Which of the four files lie in a folder; the .gz wins, as unpacking it may have been interrupted."""
    files = {}
    for name in MNIST:
        path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
        if path:
            files[name] = path
    return files


def _look(root: Path | None) -> dict[str, Path]:
    complete = (files for files in map(_present, _folders(root)) if len(files) == len(MNIST))
    return next(complete, {})


def _advice(root: Path | None, reason: str = "") -> str:
    folder = root or data_home() / "mnist"
    partial = [
        f"{where} lacks {', '.join(name for name in MNIST if name not in files)}. "
        for where in _folders(root)
        if (files := _present(where))
    ]
    return (
        f"MNIST is not on disk{f' and could not be fetched ({reason})' if reason else ''}. {''.join(partial)}"
        f"Put these four files, each as it is or as .gz, into {folder}: {', '.join(MNIST)} (from {MIRROR}), "
        f"or name {'another' if root else 'their'} folder: --root DIR."
    )
