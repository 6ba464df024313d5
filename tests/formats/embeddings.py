"""Drawn embeddings with a planted shortcut, in the formats of the dataset `embeddings`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
COUNTS = {"train": (40, 6, 6, 40), "val": (12, 6, 6, 12), "test": (8, 8, 8, 8)}


def draw(dims: int = 6, seed: int = 0) -> Arrays:
    """Features (n, d) with the class in column 0, the attribute, louder, in column 1 and a constant in column 2."""
    rng = np.random.default_rng(seed)
    group = np.concatenate([np.repeat(np.arange(4), counts) for counts in COUNTS.values()])
    split = np.repeat(np.arange(3), [sum(counts) for counts in COUNTS.values()])
    order = rng.permutation(len(group))
    y, a, split = group[order] // 2, group[order] % 2, split[order]
    features = rng.standard_normal((len(y), dims)).astype(np.float32)
    features[:, 0] += 2 * (2 * y - 1)
    features[:, 1] += 6 * (2 * a - 1) + 3
    features[:, 2] = 0.3
    return {"features": features, "y": y, "a": a, "split": split}


def write_npz(path: Path, **changes: Any) -> Path:
    """The drawn arrays with some of them changed, or left out where the change is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: array for name, array in (draw() | changes).items() if array is not None}
    np.savez(path, **arrays)
    return path
