"""A user's own pictures, from a table or a tree of folders; the card is read from the files.

(a) `metadata.csv` with the columns filename, split (train, val, test or 0, 1, 2), y, and one per attribute;
(b) a tree `SPLIT/CLASS/VALUE/*.jpg` with one attribute, the layout of SpuCo's image folders.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.home import data_home
from ..benchmark.pictures import Pictures
from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Card, Recipe, Transform
from ..benchmark.store import Splits
from .own import SPLIT_NAMES, Labels, Where, check, check_variant, read_column, slug
from .tables import PICTURES, FileDataset, codes, read_table, safe_path

TABLE, COLUMNS = "metadata.csv", ("filename", "split", "y")
TREE = (("train",), ("val", "valid", "validation"), ("test",))
"""Names that the folder of each split may have."""
ATTRIBUTE = "attribute"
"""What the attribute of a tree, which does not name it, is called."""
_LAYOUTS = (
    "Layout 1: a table metadata.csv with a header: filename (below the folder), split (train, val, test or 0, 1, 2), "
    "y (the class), and one column per attribute.",
    "Layout 2: a tree SPLIT/CLASS/VALUE/*.jpg (or .jpeg, .png) with the splits train, val and test, and one attribute.",
)

CARD = Card(
    name="folder",
    title="Your own pictures: --root DIR with metadata.csv or a tree SPLIT/CLASS/VALUE/*.jpg",
    classes=(),
    attributes=(),
    image=(224, 224, 3),
    counts={},
    licence="the user's",
    citation="none",
    recipe=Recipe(optimizer="sgd", lr=1e-3, weight_decay=1e-4, batch_size=64, epochs=30, augment="crop+flip"),
    backbone="resnet18",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    notes=(
        *_LAYOUTS,
        "Use: --dataset folder --root DIR, or --dataset folder:NAME for the folder $WORSTGROUP_HOME/data/NAME.",
        "Classes and values are sorted. The aligned value of a class is the one of the greatest lift P(a|y) / P(a) in "
        "train; gaps mean little where shortcuts are not one value per class.",
        "The backbone starts from random weights: give --weights imagenet1k_v1 to start from pretrained ones.",
        "Records carry labels and attributes, as intervals need them: mind that when you pass records on.",
        "Random crops in training are drawn from the stored picture, not from the photograph.",
    ),
    transforms={
        "crop": Transform("resize 256x256, crop 224x224", (224, 224)),
        "squeeze": Transform("resize 224x224", (224, 224)),
    },
    by_hand="The pictures are yours. " + " ".join(_LAYOUTS),
)


class Listing(NamedTuple):
    """Pictures (n), their labels, and how they are named in messages."""

    files: list[Path]
    labels: Labels
    where: Where


def make(name: str) -> Card:
    """What stands for `folder:NAME` until its files are read."""
    check_variant("folder", name)
    return replace(CARD, name=f"folder:{name}")


@dataset("folder", {"": CARD}, make)
class Folder(FileDataset):
    """Pictures and labels of a folder."""

    def describe(self, root: Path | None) -> Card:
        """The card of what lies in the folder; raises `MissingData` or `CorruptFile`."""
        folder = find(self.card, root)
        labels = read(folder).labels
        name = self.card.variant or slug(folder.resolve().name)
        title = f"{name}: {len(labels.split):,} pictures of the user's"
        return replace(self.card, name=f"folder:{name}", title=title, **labels.facts())

    def load(self, root: Path | None) -> Splits:
        """Read table or tree; pictures are decoded when they are asked for."""
        files, labels, where = read(find(self.card, root))
        return labels.splits(Pictures(files, self.card.pixels, where=where))


def find(card: Card, root: Path | None) -> Path:
    """The folder of a card: `root` or `root/NAME`, without `root` `NAME` in the data home; raises `MissingData`."""
    name = card.variant
    places = [root, root / name] if root else [data_home() / name] if name else []
    for folder in places:
        if any((folder / mark).exists() for mark in (TABLE, *TREE[0])):
            return folder
    looked = " or ".join(dict.fromkeys(map(str, places)))
    lacking = f"neither {TABLE} nor a folder train lies in {looked}" if places else "--root DIR is missing"
    raise MissingData(f"{card.name}: {lacking}. {CARD.by_hand}")


def read(folder: Path) -> Listing:
    """The table of a folder or else its tree, checked."""
    listing = read_metadata(folder) if (folder / TABLE).exists() else read_tree(folder)
    check(listing.labels, str(folder))
    return listing


def read_metadata(folder: Path) -> Listing:
    """Layout (a), in the order of its rows."""
    path = folder / TABLE
    table = read_table(path, COLUMNS)
    attributes = [column for column in table.columns if column not in COLUMNS]
    if not attributes:
        raise CorruptFile(f"{path}: has no column beside {', '.join(COLUMNS)}; it needs one or more attributes")
    if "" in attributes:
        raise CorruptFile(f"{path}: has a column without a name (pandas writes one unless index=False)")
    lines = table.index.tolist()

    def where(i: int) -> str:
        return f"{path}: line {lines[i]}"

    files = [safe_path(folder, name, where(i)) for i, name in enumerate(table["filename"])]
    twice = next((file for file, n in Counter(files).items() if n > 1), None)
    if twice is not None:
        first = files.index(twice)
        again = files.index(twice, first + 1)
        raise CorruptFile(f"{where(again)}: {table['filename'].iloc[again]!r} stands in line {lines[first]} already")
    y, *a = (read_column(name, table[name].to_numpy(str), where) for name in ("y", *attributes))
    return Listing(files, Labels(y, tuple(a), codes(table, "split", SPLIT_NAMES, path)), where)


def read_tree(folder: Path) -> Listing:
    """Layout (b), sorted by split, class, value and file name."""
    files: list[Path] = []
    split: list[int] = []
    for number, names in enumerate(TREE):
        found = [folder / name for name in names if (folder / name).is_dir()]
        if len(found) != 1:
            has = " and ".join(path.name for path in found) or "none"
            raise CorruptFile(f"{folder}: a tree needs one folder {' or '.join(names)}, this one has {has}")
        pictures = list(_pictures(found[0], 2))
        if not pictures:
            raise CorruptFile(f"{found[0]}: the {SPLITS[number]} split is empty: no CLASS/VALUE/*.jpg lies in it")
        files += pictures
        split += [number] * len(pictures)

    def where(i: int) -> str:
        return str(files[i])

    y = read_column("y", np.array([file.parts[-3] for file in files]), where)
    a = read_column(ATTRIBUTE, np.array([file.parts[-2] for file in files]), where)
    return Listing(files, Labels(y, (a,), np.array(split, np.int64)), lambda i: "")


def _pictures(folder: Path, depth: int) -> Iterator[Path]:
    """Pictures that lie exactly `depth` folders down, sorted; raises `CorruptFile` for one that lies elsewhere."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        picture = entry.name.lower().endswith(PICTURES)
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and depth:
            yield from _pictures(Path(entry.path), depth - 1)
        elif entry.is_dir() or (picture and depth):
            raise CorruptFile(f"{entry.path}: does not fit into the tree: pictures lie in SPLIT/CLASS/VALUE/")
        elif picture:
            yield Path(entry.path)
