"""Drawn pictures of a user's own, in both layouts of the dataset `folder`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Row = tuple[str, str, str, str]
"""filename, split, y and one attribute."""
HEADER = ("filename", "split", "y", "place")
COUNTS = {"train": (6, 2, 1, 5), "val": (2, 1, 1, 2), "test": (2, 2, 2, 2)}
"""cat/grass, cat/sofa, dog/grass, dog/sofa."""
CELLS = tuple((y, a) for y in ("cat", "dog") for a in ("grass", "sofa"))


def draw_picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32)) -> Path:
    """A picture of noise, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def rows() -> list[Row]:
    """The rows of a table with these counts."""
    return [
        (f"pictures/{split}-{y}-{a}-{i}.png", split, y, a)
        for split, counts in COUNTS.items()
        for (y, a), n in zip(CELLS, counts, strict=True)
        for i in range(n)
    ]


def write_table(folder: Path, table: Iterable[Sequence[str]], header: Sequence[str] = HEADER) -> Path:
    """`metadata.csv` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metadata.csv"
    path.write_text("".join(",".join(row) + "\n" for row in (header, *table)))
    return path


def write_folder(folder: Path, table: Sequence[Sequence[str]] = ()) -> Path:
    """`metadata.csv` and its pictures."""
    table = table or rows()
    write_table(folder, table)
    for seed, (name, *_) in enumerate(table):
        draw_picture(folder / name, seed)
    return folder


def write_tree(folder: Path, val: str = "val") -> Path:
    """The same pictures in a tree, as .jpg, .jpeg and .PNG; `val` is what the validation split is called."""
    for seed, (name, split, y, a) in enumerate(rows()):
        end = (".jpg", ".jpeg", ".PNG")[seed % 3]
        draw_picture(folder / (val if split == "val" else split) / y / a / f"{Path(name).stem}{end}", seed)
    return folder
