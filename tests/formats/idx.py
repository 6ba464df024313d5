"""Drawn stand-ins for MNIST: random strokes written in the idx format."""

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Digits = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """An array of labels (n,) or pictures (n, rows, cols) as idx."""
    magic = {1: 2049, 3: 2051}[array.ndim]
    return b"".join(number.to_bytes(4, "big") for number in (magic, *array.shape)) + array.tobytes()


def write_idx(path: Path, array: NDArray[np.uint8]) -> Path:
    """Write an idx file, gzipped when its name ends in .gz."""
    content = idx_bytes(array)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def draw_strokes(n: int, seed: int = 0) -> Digits:
    """Pictures (n, 28, 28) of one straight stroke each, and labels (n,) in which every digit occurs."""
    rng = np.random.default_rng(seed)
    images = np.zeros((n, 28, 28), np.uint8)
    steps = np.linspace(0, 1, 40)
    for image in images:
        (top, left), (bottom, right) = rng.integers(4, 24, (2, 2))
        rows = np.rint(top + steps * (bottom - top)).astype(int)
        cols = np.rint(left + steps * (right - left)).astype(int)
        image[rows, cols] = rng.integers(128, 256)
    return images, rng.permutation(np.arange(n) % 10).astype(np.uint8)


def write_mnist(folder: Path, train: int = 200, test: int = 50, *, packed: bool = True) -> dict[str, Digits]:
    """Write the four files of a drawn MNIST, as .gz or unpacked; returns what is in them."""
    parts = {"train": draw_strokes(train, seed=1), "t10k": draw_strokes(test, seed=2)}
    end = ".gz" if packed else ""
    for part, (images, labels) in parts.items():
        write_idx(folder / f"{part}-images-idx3-ubyte{end}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{end}", labels)
    return parts
