"""Drawn stand-ins for the folders that LfF's generator writes: random pictures in their arrays, and its pickle."""

import pickle
from pathlib import Path

import numpy as np

NAME = "ColoredMNIST-Skewed0.05-Severity4"


class _Trap:
    """Unpickling it raises."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise RuntimeError('a pickle was opened')",)


def write_published(place: Path, name: str = NAME, train: int = 100, valid: int = 100) -> Path:
    """Write one folder with random digits and colours, every class in both parts; returns the folder."""
    rng = np.random.default_rng(0)
    folder = place / name
    for part, n in (("train", train), ("valid", valid)):
        (folder / part).mkdir(parents=True)
        np.save(folder / part / "images.npy", rng.integers(0, 256, (n, 28, 28, 3), dtype=np.uint8))
        attrs = np.stack([np.arange(n) % 10, rng.integers(0, 10, n)], axis=1)
        np.save(folder / part / "attrs.npy", attrs.astype(np.uint8))
    (folder / "attr_names.pkl").write_bytes(pickle.dumps(_Trap()))
    return folder
