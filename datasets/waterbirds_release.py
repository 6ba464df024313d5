"""Waterbirds on disk: the group_DRO release, WILDS' packaging, DFR's aligned trees, and masks beside any of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.pictures import Draw, Pictures, plain
from ..benchmark.spec import SPLITS, Transform
from ..benchmark.store import Split, Splits
from .tables import SPLIT_IDS, codes, find_folder, read_table, safe_path

ARCHIVE = "waterbird_complete95_forest2water2"
INTO = "waterbirds"
"""Folder of the data home into which archives are unpacked."""
_PLAIN = (ARCHIVE, f"cub/data/{ARCHIVE}", "waterbirds_v1.0", "waterbirds")
FOLDERS = (*_PLAIN, f"{INTO}/{ARCHIVE}", f"{INTO}/waterbirds_v1.0")
TABLES = ("metadata.csv", "combined/metadata.csv")
COLUMNS = ("img_id", "img_filename", "y", "split", "place")
ADVICE = (
    f"Unpack {ARCHIVE}.tar.gz (group_DRO) or WILDS' waterbirds_v1.0 there, or name with --root the folder that holds "
    "metadata.csv and the species folders."
)
MASK_ADVICE = (
    "The release has no masks: unpack CUB-200-2011's segmentations.tgz beside metadata.csv or beside its folder "
    "(segmentations/SPECIES/NAME.png), or put NAME.png beside each NAME.jpg."
)
THRESHOLD = 200
"""Mask levels above this are bird; CUB's masks have six levels, 0 to 255 in steps of 51, by how annotators agreed."""
GREY = 150
"""What stands behind the birds of DFR's `birds/`."""
_BITS = {"0": 0, "1": 1}
_SPLIT_CODES = {number: SPLITS.index(name) for number, name in SPLIT_IDS.items()}


@dataclass(frozen=True, eq=False)
class Release:
    """The table in the order of `img_id`, which is CUB's: names and lines (n), `y`, `place` and `split` (n,).

    `table` is the file, `folder` what a user named, `tree` where the species folders lie: these may be three places.
    """

    table: Path
    folder: Path
    tree: Path
    names: list[str]
    lines: list[int]
    y: NDArray[np.int64]
    place: NDArray[np.int64]
    split: NDArray[np.int64]

    def where(self, row: int) -> str:
        """How a row is named in messages."""
        return f"line {self.lines[row]} of {self.table.name}"

    def rows(self, split: int) -> NDArray[np.int64]:
        """Rows of one split, by its number."""
        return np.flatnonzero(self.split == split)

    def file(self, tree: Path, row: int) -> Path:
        """A row's picture below one of the aligned trees."""
        return safe_path(tree, self.names[row], f"{self.table}: line {self.lines[row]}")

    def pictures(self, transform: Transform) -> Pictures:
        """All pictures as released, whatever their split: variants that show the same share one pool."""
        files = [self.file(self.tree, row) for row in range(len(self.names))]
        return Pictures(files, transform, where=self.where)

    def splits(self, transform: Transform) -> Splits:
        """The official splits with y the bird and a (n, 1) the place."""
        images = self.pictures(transform)
        parts = {name: self.rows(number) for number, name in enumerate(SPLITS)}
        return {name: Split(images, self.y[rows], self.place[rows, None], rows=rows) for name, rows in parts.items()}


def read_release(what: str, root: Path | None) -> Release:
    """Find and read the table; raises `MissingData`, or `CorruptFile` that names the line that is wrong.

    `place_filename` is not read: the Places pictures are no part of the release.
    """
    folder = find_folder(what, FOLDERS, root, TABLES, ADVICE)
    path = next(folder / name for name in TABLES if (folder / name).exists())
    table = read_table(path, COLUMNS)
    for column in ("img_id", "img_filename"):
        _check_unique(table, column, path)
    table = table.iloc[np.argsort(_numbers(table, "img_id", path), kind="stable")]
    return Release(
        table=path,
        folder=folder,
        tree=combined if (combined := folder / "combined").is_dir() else folder,
        names=table["img_filename"].tolist(),
        lines=table.index.tolist(),
        y=codes(table, "y", _BITS, path),
        place=codes(table, "place", _BITS, path),
        split=codes(table, "split", _SPLIT_CODES, path),
    )


def _check_unique(table: pd.DataFrame, column: str, path: Path) -> None:
    repeated = table[column].duplicated()
    if repeated.any():
        line = table.index[repeated][0]
        raise CorruptFile(f"{path}: line {line}: {column} {table[column][line]!r} stands in an earlier line, too")


def _numbers(table: pd.DataFrame, column: str, path: Path) -> NDArray[np.int64]:
    """A column of whole numbers (n,)."""
    wrong = ~table[column].str.fullmatch(r"[0-9]{1,18}")
    if wrong.any():
        line = table.index[wrong][0]
        raise CorruptFile(f"{path}: line {line}: {column} is {table[column][line]!r}, it must be a whole number")
    return table[column].to_numpy(dtype=np.int64)


# --------------------------------------------------------------------------------------------------- foreground only


def on_black(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """The bird alone on black: the picture times (mask > 200), as ExMap's code has it."""
    return _cut_out(photo, mask, 0)


def on_grey(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """The bird alone on the grey of DFR's `birds/`, cut out as for `on_black`."""
    return _cut_out(photo, mask, GREY)


def on_nothing(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """White where the bird is, black elsewhere."""
    check_size(photo, mask)
    return mask.convert("L").point(lambda value: 255 * (value > THRESHOLD)).convert("RGB")


def _cut_out(photo: Image.Image, mask: Image.Image, level: int) -> Image.Image:
    """A binary mask even for grey: a soft one would let the place shine through at the bird's rim."""
    check_size(photo, mask)
    bird = mask.convert("L").point(lambda value: 255 * (value > THRESHOLD))
    return Image.composite(plain(photo), Image.new("RGB", photo.size, (level,) * 3), bird)


def check_size(photo: Image.Image, mask: Image.Image) -> None:
    """Raise `ValueError` for a mask that is not that of the photograph."""
    if photo.size != mask.size:
        raise ValueError(f"it has {photo.width}x{photo.height} px, its mask {mask.width}x{mask.height}")


def cut_out_birds(release: Release, rows: NDArray[np.int64], draw: Draw, transform: Transform) -> Pictures:
    """Pictures of these rows without their places; raises `MissingData` that names the picture without a mask."""
    files = [(release.file(release.tree, row), _mask(release, row)) for row in rows]
    return Pictures(files, transform, draw=draw, where=_named(release, rows))


def drawn_birds(release: Release, rows: NDArray[np.int64], transform: Transform) -> Pictures | None:
    """Pictures of these rows from DFR's `birds/`, or None where that tree is not there."""
    tree = release.tree.with_name("birds")
    if release.tree.name != "combined" or not tree.is_dir():
        return None
    return Pictures([release.file(tree, row) for row in rows], transform, where=_named(release, rows))


def _named(release: Release, rows: NDArray[np.int64]) -> Callable[[int], str]:
    return lambda i: release.where(rows[i])


def _mask(release: Release, row: int) -> Path:
    """A row's mask: a PNG beside its picture, or in a tree of masks."""
    picture = release.file(release.tree, row)
    trees = [release.tree, release.folder / "segmentations", release.folder.parent / "segmentations"]
    for mask in (release.file(tree, row).with_suffix(".png") for tree in trees):
        if mask != picture and mask.is_file():
            return mask
    raise MissingData(f"{picture} ({release.where(row)}) has no mask. {MASK_ADVICE}")
