"""Spawrious: generated pictures of four dog breeds at six places; in test every breed stands where it never stood.

A challenge says at which places each breed stands in two training environments and in test; all challenges are entered
at the end of the file. One to one (O2O): a breed has one place, and some pictures at a filler place that all breeds
share. Many to many (M2M): a breed has another place in each environment.
Source: Lynch, Dovonon, Kaddour, Silva, 2023, and its code (aengusl/spawrious).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark.pictures import Pictures
from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Attribute, Card, Recipe, Source, SplitName, Transform
from ..benchmark.store import Split, Splits
from .tables import FileDataset, find_folder, list_folders

BREEDS = ("bulldog", "corgi", "dachshund", "labrador")
"""In the order of the class index, which is not the order in which the paper's tables name them."""
PLACES = ("desert", "jungle", "dirt", "mountain", "snow", "beach")
FULL = 3168
"""Pictures of every breed at every place, in each of the two copies `0` and `1` of the dataset."""
TEST = -1
"""In place of an environment."""

_DROPBOX = "https://www.dropbox.com/s"
_ENTIRE = ("hofkueo8qvaqlp3", "spawrious224__entire_dataset.tar.gz")
_NAMES = ("spawrious/spawrious224", "spawrious224", "spawrious")


@dataclass(frozen=True)
class Cell:
    """Pictures of one breed at one place, out of one copy, for one training environment or for `TEST`."""

    env: int
    copy: int
    place: int
    y: int
    percent: int = 100
    filler: bool = False

    @property
    def folder(self) -> str:
        """Where they lie below the dataset's folder."""
        return f"{self.copy}/{PLACES[self.place]}/{BREEDS[self.y]}"

    def size(self, n: int) -> int:
        """How many of the `n` pictures in the folder are shown: `percent` of them, or as many as those leave out."""
        main = n * self.percent // 100
        return n - main if self.filler else main


def cells(params: dict[str, Any]) -> list[Cell]:
    """Every cell of a challenge: the environments with their main and filler places, then test."""
    return [*_train_cells(params), *_test_cells(params)]


def _train_cells(params: dict[str, Any]) -> Iterator[Cell]:
    for env, (copy, percent) in enumerate(zip(params["copies"], params["main_percent"], strict=True)):
        for y, breed in enumerate(BREEDS):
            yield Cell(env, copy, PLACES.index(params["train"][breed][env]), y, percent)
        if params["filler"]:
            for y in range(len(BREEDS)):
                yield Cell(env, copy, PLACES.index(params["filler"]), y, percent, filler=True)


def _test_cells(params: dict[str, Any]) -> Iterator[Cell]:
    for half, copy in enumerate(params["copies"]):
        for y, breed in enumerate(BREEDS):
            yield Cell(TEST, copy, PLACES.index(params["test"][breed][half]), y)


def held_out(cell: Cell, size: int, params: dict[str, Any]) -> NDArray[np.bool_]:
    """Which of a cell's pictures (n,) are for validation: `val_percent` of a training cell, at least one of several."""
    held = np.zeros(size, bool)
    if cell.env != TEST and size > 1:
        count = min(size - 1, max(1, (size * params["val_percent"] + 50) // 100))
        random = np.random.RandomState([params["seed"], cell.env, cell.y, cell.place])  # cells do not shift each other
        held[random.permutation(size)[:count]] = True
    return held


def official_counts(params: dict[str, Any]) -> dict[SplitName, tuple[int, ...]]:
    """Group counts when every folder holds its 3,168 pictures."""
    table = {name: np.zeros((len(BREEDS), len(PLACES)), np.int64) for name in SPLITS}
    for cell in cells(params):
        size = cell.size(FULL)
        held = int(held_out(cell, size, params).sum())
        table["test" if cell.env == TEST else "train"][cell.y, cell.place] += size - held
        table["val"][cell.y, cell.place] += held
    return {name: tuple(int(n) for n in table[name].ravel()) for name in SPLITS}


# ------------------------------------------------------------------------------------------------------------- cards


def _o2o(train: dict[str, str], test: dict[str, str], filler: str) -> dict[str, Any]:
    """Parameters of a one-to-one challenge: environment i shows copy i, test both copies."""
    return {
        "train": {breed: [train[breed]] * 2 for breed in BREEDS},
        "test": {breed: [test[breed]] * 2 for breed in BREEDS},
        "filler": filler,
        "main_percent": [97, 87],
        "copies": [0, 1],
        "val_percent": 15,
        "seed": 0,
    }


def _m2m(train: dict[str, str], test: dict[str, str]) -> dict[str, Any]:
    """Parameters of a many-to-many challenge: both environments and test show copy 0."""
    return {
        "train": {breed: train[breed].split() for breed in BREEDS},
        "test": {breed: test[breed].split() for breed in BREEDS},
        "filler": "",
        "main_percent": [100, 100],
        "copies": [0, 0],
        "val_percent": 15,
        "seed": 0,
    }


_NOTES = (
    "There is no official validation set. Validation is 15 % of each training environment, drawn within every breed "
    "and place: it has the correlation of train, and none of the test groups.",
    "No test group occurs in training: gaps, and accuracies weighted by train counts, are n/a.",
    "The place aligned with a class is its main place in training; in a many-to-many challenge, its place in the first "
    "environment.",
    "The recipe is DomainBed's: Adam, 32 images from each environment, 5,001 steps. Of its augmentation only the flip "
    "is done, no colour jitter and no random grey. eX2L trains with SGD on batches of 128 from other weights "
    "(ImageNet, version 2), at learning rates that it searched and does not report.",
)
_CUT = (
    "An environment shows 97 % or 87 % of a folder and the rest of 100 % from the filler's (3,072 and 96, or 2,756 and "
    "412): the first by name. The original code takes the first that the file system lists, which differ by machine.",
    "Names start with machine and prompt: the filler's pictures come from few of the 72 prompts.",
)


def _card(variant: str, params: dict[str, Any], archive: tuple[str, str]) -> Card:
    kind, level = variant.split("-")
    title = {"o2o": "one place for each breed", "m2m": "two places for each breed, exchanged in test"}[kind]
    aligned = tuple(PLACES.index(params["train"][breed][0]) for breed in BREEDS)
    return Card(
        name=f"spawrious:{variant}",
        title=f"Spawrious, {title} ({level})",
        classes=BREEDS,
        attributes=(Attribute("place", PLACES, aligned),),
        image=(224, 224, 3),
        counts=official_counts(params),
        licence="CC BY 4.0",
        citation=(
            "Lynch, Dovonon, Kaddour, Silva: Spawrious: A Benchmark for Fine Control of Spurious Correlation Biases, "
            "arXiv:2303.05470, 2023"
        ),
        recipe=Recipe(optimizer="adam", lr=5e-5, weight_decay=0.0, batch_size=64, epochs=15, augment="flip"),
        backbone="resnet50",
        weights="imagenet1k_v1",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        sources=(Source(archive[1], urls=(f"{_DROPBOX}/{archive[0]}/{archive[1]}?dl=1",), into="spawrious"),),
        notes=(*(_CUT if params["filler"] else ()), *_NOTES),
        params=params,
        adaptable=True,
        environments=("SC_group_1", "SC_group_2"),
        transforms={"spawrious": Transform("resize 224x224", (224, 224))},
    )


_VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "o2o-easy": (
        _o2o(
            {"bulldog": "desert", "dachshund": "jungle", "labrador": "dirt", "corgi": "snow"},
            {"bulldog": "dirt", "dachshund": "snow", "labrador": "desert", "corgi": "jungle"},
            filler="beach",
        ),
        ("kwhiv60ihxe3owy", "spawrious224__o2o_easy.tar.gz"),
    ),
    "o2o-medium": (
        _o2o(
            {"bulldog": "mountain", "dachshund": "beach", "labrador": "dirt", "corgi": "jungle"},
            {"bulldog": "jungle", "dachshund": "dirt", "labrador": "beach", "corgi": "snow"},
            filler="desert",
        ),
        ("x03gkhdwar5kht4", "spawrious224__o2o_medium.tar.gz"),
    ),
    "o2o-hard": (
        _o2o(
            {"bulldog": "jungle", "dachshund": "mountain", "labrador": "snow", "corgi": "desert"},
            {"bulldog": "mountain", "dachshund": "snow", "labrador": "desert", "corgi": "jungle"},
            filler="beach",
        ),
        ("p1ry121m2gjj158", "spawrious224__o2o_hard.tar.gz"),
    ),
    "m2m-easy": (
        _m2m(
            {
                "bulldog": "desert mountain",
                "dachshund": "mountain desert",
                "labrador": "dirt jungle",
                "corgi": "jungle dirt",
            },
            {
                "bulldog": "dirt jungle",
                "dachshund": "jungle dirt",
                "labrador": "mountain desert",
                "corgi": "desert mountain",
            },
        ),
        _ENTIRE,
    ),
    "m2m-medium": (
        _m2m(
            {
                "bulldog": "beach snow",
                "dachshund": "snow beach",
                "labrador": "mountain desert",
                "corgi": "desert mountain",
            },
            {
                "bulldog": "desert mountain",
                "dachshund": "mountain desert",
                "labrador": "beach snow",
                "corgi": "snow beach",
            },
        ),
        _ENTIRE,
    ),
    "m2m-hard": (
        _m2m(
            {"bulldog": "dirt jungle", "dachshund": "jungle dirt", "labrador": "snow beach", "corgi": "beach snow"},
            {"bulldog": "snow beach", "dachshund": "beach snow", "labrador": "dirt jungle", "corgi": "jungle dirt"},
        ),
        _ENTIRE,
    ),
}


@dataset("spawrious", {variant: _card(variant, *facts) for variant, facts in _VARIANTS.items()})
class Spawrious(FileDataset):
    """`spawrious224/{0,1}/PLACE/BREED/*.png`; a challenge reads only the folders that it shows.

    Each challenge has a pool of pixels of its own. One pool of all 152,064 pictures would be three times as large, and
    its identity would depend on which of the archives lie on disk.
    """

    def load(self, root: Path | None) -> Splits:
        """List the challenge's folders; raises `MissingData` that names those without pictures."""
        params, what = self.card.params, f"Spawrious ({self.card.name.partition('[')[0]})"
        (source,) = self.card.sources
        advice = f"Unpack {source.file} ({source.urls[0]}) into $WORSTGROUP_HOME/data/spawrious, or give --root DIR."
        folder = find_folder("Spawrious", _NAMES, root, [f"0/{place}" for place in PLACES], advice)
        parts = cells(params)
        listed = list_folders(what, folder, [cell.folder for cell in parts], advice)
        shown = [files[: cell.size(len(files))] for cell, files in zip(parts, listed, strict=True)]
        pictures = Pictures([file for files in shown for file in files], self.card.pixels)
        sizes = [len(files) for files in shown]
        env, y, place = (
            np.repeat([getattr(cell, name) for cell in parts], sizes).astype(np.int64) for name in ("env", "y", "place")
        )
        held = np.concatenate([held_out(cell, size, params) for cell, size in zip(parts, sizes, strict=True)])

        def split(chosen: NDArray[np.bool_], train: bool = False) -> Split:
            rows = np.flatnonzero(chosen)
            return Split(pictures, y[rows], place[rows, None], rows=rows, env=env[rows] if train else None)

        return {"train": split((env != TEST) & ~held, train=True), "val": split(held), "test": split(env == TEST)}
