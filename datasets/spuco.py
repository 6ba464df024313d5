"""SpuCo's datasets: SpuCoMNIST, digits on coloured backgrounds, and SpuCoAnimals with its halves, birds and dogs.

Source: Joshi, Yang, Xue, Yang, Mirzasoleiman, 2023, and its code (BigML-CS-UCLA/SpuCo).
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile
from ..benchmark.pictures import Pictures
from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Attribute, Card, Recipe, Source, SplitName, Transform
from ..benchmark.store import Split, Splits
from .idx import MNIST, Digits, digits_key, find_digits, read_digits
from .tables import FileDataset, find_folder, list_folders

_CITATION = (
    "Joshi, Yang, Xue, Yang, Mirzasoleiman: Towards Mitigating Spurious Correlations in the Wild: A Benchmark and a "
    "more Realistic Dataset, arXiv:2306.11957, 2023"
)

# ----------------------------------------------------------------------------------------------------------- animals


@dataclass(frozen=True)
class Half:
    """One half of SpuCoAnimals: its folder, and the names of its classes and places, which are folders too.

    The i-th place is aligned with the i-th class. `download` is what its authors offer.
    """

    folder: str
    classes: tuple[str, str]
    places: tuple[str, str]
    download: str

    def cells(self, split: SplitName) -> list[str]:
        """The folders of a split below the half's folder: class major, then place."""
        return [f"{split}/{label}/{place}" for label, place in product(self.classes, self.places)]


HALVES = {
    "birds": Half(
        "spuco_birds",
        ("landbirds", "waterbirds"),
        ("land", "water"),
        "https://ucla.box.com/shared/static/zrsx09ik7lqad1e389w06f1c4nbajo9z",
    ),
    "dogs": Half(
        "spuco_dogs",
        ("small_dogs", "big_dogs"),
        ("indoor", "outdoor"),
        "https://ucla.box.com/shared/static/u3dkllvq7a2py4x443pqul295wwd549e",
    ),
}
SIZES: dict[SplitName, tuple[int, int]] = {"train": (10_000, 500), "val": (500, 25), "test": (500, 500)}
"""Pictures of an aligned and of an unaligned group."""


def _animals(variant: str, title: str, *names: str) -> Card:
    """The card of some halves together: groups of a class of one half at a place of another are empty."""
    halves = [HALVES[name] for name in names]
    archives = [f"{half.folder}.tar.gz ({half.download})" for half in halves]
    tables = {
        split: np.kron(np.eye(len(halves), dtype=np.int64), [[aligned, other], [other, aligned]])
        for split, (aligned, other) in SIZES.items()
    }
    classes = tuple(label for half in halves for label in half.classes)
    places = tuple(place for half in halves for place in half.places)
    empty = ("Birds stand on land or water and dogs indoors or outdoors: 8 of the 16 groups are empty.",)
    return Card(
        name=f"spuco:{variant}",
        title=title,
        classes=classes,
        attributes=(Attribute("place", places, aligned=tuple(range(len(places))), train_ratio=20 / 21),),
        image=(224, 224, 3),
        counts={split: tuple(int(n) for n in tables[split].ravel()) for split in SPLITS},
        licence="the pictures are ImageNet's: non-commercial research and education only",
        citation=_CITATION,
        recipe=Recipe(lr=1e-3, weight_decay=1e-4, batch_size=128, epochs=100),
        backbone="resnet18",
        weights="imagenet1k_v1",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        sources=tuple(Source(f"{half.folder}.tar.gz", into="spuco") for half in halves),
        notes=(
            *(empty if len(halves) > 1 else ()),
            "Validation has the correlation of train, test has none.",
            "The pictures are ImageNet's: weights that were trained on ImageNet may have seen those of test.",
            "The recipe and backbone are those of SpuCo's quick start, which trains for 300 epochs, not 100.",
        ),
        params={"halves": list(names)},
        adaptable=True,
        transforms={"spuco": Transform("resize 256x256, crop 224x224", (224, 224))},
        by_hand=(
            "The pictures are ImageNet's, whose terms of access you have to accept yourself. Then unpack "
            f"{' and '.join(archives)} into $WORSTGROUP_HOME/data/spuco, or give --root DIR."
        ),
    )


def load_animals(card: Card, root: Path | None) -> Splits:
    """List the folders of a card's halves; raises `MissingData` that names those without pictures."""
    files: list[Path] = []
    labels: list[NDArray[np.int64]] = []  # (n, 3) each: number of the split, class, place
    halves = [HALVES[name] for name in card.params["halves"]]
    roots = [
        find_folder("SpuCo", (f"spuco/{half.folder}", half.folder), root, half.cells("train"), card.by_hand)
        for half in halves
    ]
    for number, split in enumerate(SPLITS):
        for first, half, folder in zip((0, 2), halves, roots, strict=False):
            listed = list_folders(f"SpuCo ({half.folder})", folder, half.cells(split), card.by_hand)
            for (y, place), found in zip(product((0, 1), repeat=2), listed, strict=True):
                files += found
                labels.append(np.tile([number, first + y, first + place], (len(found), 1)))
    pictures, table = Pictures(files, card.pixels), np.concatenate(labels)
    rows = {name: np.flatnonzero(table[:, 0] == number) for number, name in enumerate(SPLITS)}
    return {name: Split(pictures, table[at, 1], table[at, 2:], rows=at) for name, at in rows.items()}


# ------------------------------------------------------------------------------------------------------------- mnist

COLORS = ((255, 0, 0), (209, 255, 0), (0, 255, 92), (0, 116, 255), (185, 0, 255))
"""Matplotlib's map `hsv` at 0, 0.2, 0.4, 0.6 and 0.8, rounded to bytes."""

MNIST_CARD = Card(
    name="spuco:mnist",
    title="SpuCoMNIST, five classes of two digits on coloured backgrounds, 99.5 % correlation in train",
    classes=("digit 0-1", "digit 2-3", "digit 4-5", "digit 6-7", "digit 8-9"),
    attributes=(
        Attribute("background", ("red", "lime", "green", "blue", "violet"), (0, 1, 2, 3, 4), train_ratio=0.995),
    ),
    image=(28, 28, 3),
    counts={  # a line a class
        "train": (
            *(10_082, 18, 9, 14, 10),
            *(16, 9_623, 9, 14, 10),
            *(15, 7, 8_965, 11, 13),
            *(12, 13, 11, 9_698, 13),
            *(5, 16, 18, 9, 9_393),
        ),
        "val": (
            *(507, 507, 506, 506, 506),
            *(484, 484, 483, 483, 483),
            *(451, 451, 450, 450, 450),
            *(488, 487, 487, 487, 487),
            *(472, 472, 472, 472, 471),
        ),
        "test": (
            *(423, 423, 423, 423, 423),
            *(409, 409, 408, 408, 408),
            *(375, 375, 375, 375, 374),
            *(398, 397, 397, 397, 397),
            *(397, 397, 397, 396, 396),
        ),
    },
    licence=f"{MNIST.licence}; the backgrounds are drawn here",
    citation=f"{_CITATION}. {MNIST.citation}",
    recipe=Recipe(optimizer="adam", lr=1e-3, weight_decay=1e-4, batch_size=128, epochs=10, schedule="cosine"),
    backbone="tiny_cnn",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    sources=MNIST.sources,
    fetch_unasked=True,
    notes=(
        "Validation has the size of the original, 11,996, but not its pictures, which are a fixed list in SpuCo: it is "
        "drawn here within each digit.",
        "Validation and test are balanced: every background stands behind a fifth of each class.",
        "Backgrounds fill the whole picture (magnitude large) and are rounded to bytes; the original keeps fractions.",
        "Recipe and backbone are for the small network; the original trains a LeNet.",
    ),
    params={"val": 11_996, "correlation": 0.995, "seed": 0},
)


def load_mnist(card: Card, root: Path | None) -> Splits:
    """Read MNIST, cut validation off its train part, and draw the backgrounds of each split.

    Raises `MissingData` or `CorruptFile`.
    """
    train, t10k = read_digits(find_digits(MNIST, root))
    val, correlation, seed = (card.params[key] for key in ("val", "correlation", "seed"))
    if len(train.labels) <= val:
        raise CorruptFile(f"{card.name}: MNIST has {len(train.labels)} train digits, validation alone takes {val}")
    cut = held_out(train.labels, val, seed)
    parts: dict[SplitName, Digits] = {
        "train": Digits(train.images[~cut], train.labels[~cut]),
        "val": Digits(train.images[cut], train.labels[cut]),
        "test": t10k,
    }
    splits: Splits = {}
    for number, (name, part) in enumerate(parts.items()):
        y = part.labels.astype(np.int64) // 2
        random = np.random.RandomState([seed, number + 1])
        background = draw_backgrounds(y, correlation if name == "train" else None, random)
        splits[name] = Split(paint(part.images, background), y, background[:, None])
    return splits


def held_out(labels: NDArray[np.uint8], size: int, seed: int) -> NDArray[np.bool_]:
    """Which examples (n,) are for validation: `size` of them, the same share of every digit."""
    random = np.random.RandomState(seed)
    rank = np.empty(len(labels))
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        rank[random.permutation(members)] = (np.arange(len(members)) + 0.5) / max(1, len(members))
    held = np.zeros(len(labels), bool)
    held[np.argsort(rank, kind="stable")[len(labels) - size :]] = True
    return held


def draw_backgrounds(
    y: NDArray[np.int64], correlation: float | None, random: np.random.RandomState
) -> NDArray[np.int64]:
    """Background (n,) of each example: that of its class on a share `correlation` of the class, else any other.

    Without `correlation` every background has the same share. Shares are exact, not drawn (as in SpuCo).
    """
    number = len(COLORS)
    background = np.empty(len(y), np.int64)
    for c in range(number):
        members = np.flatnonzero(y == c)
        position = np.arange(len(members))
        if correlation is None:
            colors = position % number
        else:
            aligned = random.permutation(len(members)) < int(correlation * len(members))
            colors = np.where(aligned, c, (c + 1 + position % (number - 1)) % number)
        background[members] = random.permutation(colors)
    return background


def paint(digits: NDArray[np.uint8], background: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Grey digits (n, 28, 28) with every black pixel in the colour of their background, (n, 28, 28, 3)."""
    color = np.array(COLORS, np.uint8)[background][:, None, None, :]
    return np.where(digits[..., None] == 0, color, digits[..., None])


# ---------------------------------------------------------------------------------------------------------- variants

_VARIANTS = {
    "mnist": MNIST_CARD,
    "birds": _animals("birds", "SpuCoBirds, birds of land and of water on either", "birds"),
    "dogs": _animals("dogs", "SpuCoDogs, small and big dogs indoors and outdoors", "dogs"),
    "animals": _animals("animals", "SpuCoAnimals, the birds and the dogs together", "birds", "dogs"),
}


@dataset("spuco", _VARIANTS)
class SpuCo(FileDataset):
    """The datasets of SpuCo: animals in folders, and digits that are painted here."""

    def __init__(self, card: Card) -> None:
        super().__init__(card)
        self.animals = "halves" in card.params

    def source_key(self, root: Path | None) -> str:
        """Identity of the files; raises `MissingData` when they are not there."""
        return super().source_key(root) if self.animals else digits_key(MNIST, find_digits(MNIST, root))

    def load(self, root: Path | None) -> Splits:
        """Read the variant's files; raises `MissingData` or `CorruptFile`."""
        return load_animals(self.card, root) if self.animals else load_mnist(self.card, root)
