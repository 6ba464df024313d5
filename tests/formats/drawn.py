"""Drawn pictures in files: photograph-like ones, and the tree of the dataset of `tests/fixtures/drawnset.py`."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COUNTS: dict[str, tuple[int, ...]] = {"train": (4, 2, 1, 3), "val": (2, 1, 1, 2), "test": (2, 2, 2, 2)}
"""Group counts (y major) of the splits that `write_drawn` draws."""


def photograph(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture (height, width, 3) of soft blobs, edges and a little noise, as photographs have them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    soft[height // 3 : height // 2, width // 4 : width // 2] //= 2
    return np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8)


def write_drawn(folder: Path, counts: Mapping[str, tuple[int, ...]] = COUNTS) -> Path:
    """Write `table.csv` and the pictures, of many sizes, that it lists; returns the folder."""
    (folder / "pictures").mkdir(parents=True)
    lines, seed = ["file,split,y,frame"], 0
    for number, (split, cells) in enumerate(counts.items()):
        for (y, frame), n in zip(product((0, 1), repeat=2), cells, strict=True):
            for _ in range(n):
                picture = photograph(20 + seed % 5, 17 + seed % 3, seed)
                picture[:, :, 0] = picture[:, :, 0] // 2 + 127 * y
                picture[:2] = 255 * frame
                name = f"pictures/{split}_{seed}.png"
                Image.fromarray(picture).save(folder / name)
                lines.append(f"{name},{number},{y},{frame}")
                seed += 1
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder
