"""The idx format, and the families of four idx files (MNIST, Fashion-MNIST): found, read, fetched and told apart.

idx is a big-endian magic number (2051 for pictures, 2049 for labels), the size of each axis as 32 bits, then the bytes.
"""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.home import data_home
from ..benchmark.spec import Source, digest
from ..benchmark.store import search


class Digits(NamedTuple):
    """Pictures (n, 28, 28) uint8 and their labels (n,) uint8, 0 to 9; both read-only."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class Family:
    """Four idx files of 60,000 + 10,000 pictures of ten things: what they are called and where they may lie.

    `files` are name, MD5 of the official .gz, MD5 of its content, and bytes of the .gz; `folder` lies in the data home,
    `inner` are folders in it, the first one torchvision's; `sizes` are the pictures of each thing, train and t10k.
    """

    title: str
    noun: str
    folder: str
    inner: tuple[str, ...]
    mirrors: tuple[str, ...]
    files: tuple[tuple[str, str, str, int], ...]
    things: tuple[str, ...]
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    licence: str
    citation: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the four files, without the ending .gz."""
        return tuple(name for name, *_ in self.files)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where the four files can be fetched."""
        return tuple(
            Source(
                f"{name}.gz",
                packed,
                tuple(f"{mirror}{name}.gz" for mirror in self.mirrors),
                size,
                into=f"{self.folder}/{self.inner[0]}",
            )
            for name, packed, _, size in self.files
        )


MNIST = Family(
    title="MNIST",
    noun="digit",
    folder="mnist",
    inner=("MNIST/raw", "raw", ""),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    files=(
        (
            "train-images-idx3-ubyte",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "6bbc9ace898e44ae57da46a324031adb",
            9_912_422,
        ),
        ("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624", 28_881),
        ("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea", 1_648_877),
        ("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637", 4_542),
    ),
    things=tuple("0123456789"),
    sizes=(
        (5_923, 6_742, 5_958, 6_131, 5_842, 5_421, 5_918, 6_265, 5_851, 5_949),
        (980, 1_135, 1_032, 1_010, 982, 892, 958, 1_028, 974, 1_009),
    ),
    licence="MNIST: commonly given as CC BY-SA 3.0 (LeCun, Cortes)",
    citation=(
        "LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, Proceedings of the "
        "IEEE 1998 (MNIST)"
    ),
)

FASHION = Family(
    title="Fashion-MNIST",
    noun="item",
    folder="fashion-mnist",
    inner=("FashionMNIST/raw", "FashionMNIST", "raw", ""),
    mirrors=("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",),
    files=(
        (
            "train-images-idx3-ubyte",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            26_421_880,
        ),
        ("train-labels-idx1-ubyte", "25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9", 29_515),
        ("t10k-images-idx3-ubyte", "bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a", 4_422_102),
        ("t10k-labels-idx1-ubyte", "bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965", 5_148),
    ),
    things=("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    sizes=((6_000,) * 10, (1_000,) * 10),
    licence="Fashion-MNIST: MIT (Zalando SE)",
    citation=(
        "Xiao, Rasul, Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017"
    ),
)

_AXES = {2049: 1, 2051: 3}
_GZIP = b"\x1f\x8b"
_REPLACE = "Replace it by the official file."


# ---------------------------------------------------------------------------------------------------------- reading


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file, gzipped or not, as a read-only array: (n, rows, cols) pictures or (n,) labels.

    Raises `CorruptFile`, which names the path, for a broken gzip, a foreign file, a truncated one and trailing bytes.
    """
    content = _unpack(path)
    magic = int.from_bytes(content[:4], "big")
    if len(content) < 4 or magic not in _AXES:
        raise CorruptFile(
            f"{path}: not an idx file: it starts with {content[:4].hex(' ') or 'nothing'}, "
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


def read_digits(files: dict[str, Path]) -> tuple[Digits, Digits]:
    """Read the four files that `find_digits` found: the train part, then the t10k part.

    Raises `CorruptFile` when a file is broken, or pictures and labels do not belong together.
    """
    return _read_part(files, "train"), _read_part(files, "t10k")


def digits_key(family: Family, files: dict[str, Path]) -> str:
    """Identity of the four files by MD5: of what lies on disk (0.1 s) or, where that is unknown, of its content.

    So the official files have one key, whether packed, unpacked or packed anew by a distribution. Others count by what
    they hold; whether the official labels are in them is for the card's counts to say.
    """
    parts = []
    for name, packed, content, _ in family.files:
        found = _md5(_content(files[name]))
        parts.append(content if found in (packed, content) else _md5(_unpack(files[name])))
    return digest(parts)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


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


def find_digits(family: Family, root: Path | None) -> dict[str, Path]:
    """Find the four files, each as `NAME.gz` or `NAME`, in one folder.

    Raises `MissingData` that says what to put where.
    """
    found = _look(family, root)
    if not found:
        raise MissingData(_advice(family, root))
    return found


def _folders(family: Family, root: Path | None) -> list[Path]:
    return [folder / inner for folder in search(family.folder, root, what=family.title) for inner in family.inner]


def _present(family: Family, folder: Path) -> dict[str, Path]:
    """Which of the four files lie in a folder; the .gz wins, as unpacking it may have been interrupted."""
    files = {}
    for name in family.names:
        path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
        if path:
            files[name] = path
    return files


def _look(family: Family, root: Path | None) -> dict[str, Path]:
    found = (_present(family, folder) for folder in _folders(family, root))
    return next((files for files in found if len(files) == len(family.names)), {})


def _advice(family: Family, root: Path | None) -> str:
    folder = root or data_home() / family.folder
    partial = [
        f"{where} lacks {', '.join(name for name in family.names if name not in files)}. "
        for where in _folders(family, root)
        if (files := _present(family, where))
    ]
    return (
        f"{family.title} is not on disk. {''.join(partial)}Put these four files, each as it is or as .gz, into "
        f"{folder}: {', '.join(family.names)} (from {family.mirrors[0]}), "
        f"or name {'another' if root else 'their'} folder: --root DIR."
    )
