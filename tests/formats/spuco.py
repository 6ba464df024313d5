"""Drawn halves of SpuCoAnimals; SpuCoMNIST is made from a drawn MNIST."""

from itertools import product
from pathlib import Path

from PIL import Image

HALVES = {
    "spuco_birds": (("landbirds", "waterbirds"), ("land", "water")),
    "spuco_dogs": (("small_dogs", "big_dogs"), ("indoor", "outdoor")),
}
PICTURES = {"train": (6, 2), "val": (3, 1), "test": (2, 2)}
"""Pictures of an aligned and of an unaligned group."""


def write_spuco(root: Path, *halves: str, end: str = ".JPEG") -> Path:
    """Write some halves (by default both) below `root`, which is returned."""
    for number, half in enumerate(halves or HALVES):
        labels, places = HALVES[half]
        for split, (y, label), (a, place) in product(PICTURES, enumerate(labels), enumerate(places)):
            folder = root / half / split / label / place
            folder.mkdir(parents=True)
            for i in reversed(range(PICTURES[split][int(y != a)])):
                picture = Image.new("RGB", (40, 30), (60 * y, 60 * a, 30 * number + 4 * i))
                picture.save(folder / f"n0{i}{end}", format="PNG" if end == ".png" else "JPEG")
    return root
