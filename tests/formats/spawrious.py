"""A drawn Spawrious: every breed at every place in both copies, each picture in a colour of its own."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path

from PIL import Image

PLACES = ("beach", "desert", "dirt", "jungle", "mountain", "snow")
BREEDS = ("bulldog", "corgi", "dachshund", "labrador")
CELLS = tuple("/".join(parts) for parts in product("01", PLACES, BREEDS))


def write_spawrious(
    root: Path, pictures: int = 4, side: int = 32, *, cells: Iterable[str] = CELLS, end: str = ".png"
) -> Path:
    """Write the tree below `root/spawrious224`; returns that folder. The last file by name is written first."""
    folder = root / "spawrious224"
    for cell in cells:
        (folder / cell).mkdir(parents=True, exist_ok=True)
        for i in reversed(range(pictures)):
            picture = Image.new("RGB", (side, side), (5 * CELLS.index(cell), 10 * i, 100))
            picture.save(folder / cell / f"host_prompt_{i // 2}_{i % 2}{end}")
    return folder
