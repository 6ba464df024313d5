"""CM-10, ten digits x ten colours (LfF, BPA, ClusterFix): generated from MNIST, or read from a published folder.

LfF's generator writes `ColoredMNIST-Skewed{r}-Severity{k}/{train,valid}/{images,attrs}.npy`: pictures (n, 28, 28, 3)
uint8, and digit and colour (n, 2). r is the share of pictures whose colour is another digit's, k names how little
colours vary. Beside them lies a pickle with the names of the two columns, which is never opened.

Sources: Nam, Cha, Ahn, Lee, Shin, NeurIPS 2020, and its code (alinlab/LfF).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.pools import ImageSource
from ..benchmark.spec import Attribute, Card, Recipe, SplitName, digest
from ..benchmark.store import Split, Splits, search
from .coloring import Tinted, family_card, hold_out
from .idx import Digits, Family
from .interventions import donors

SKEWS = {"": 0.05, "-2": 0.02, "-1": 0.01, "-0.5": 0.005}
"""Ending of a variant's name to the share of training images that are not aligned."""
SEVERITIES = {"-s1": (1, 0.05), "-s2": (2, 0.02), "-s3": (3, 0.01), "": (4, 0.005)}
"""Ending of a variant's name to the severity and the standard deviation of its colours."""
COLORS = ("orange", "yellow", "mauve", "sage", "sky", "mint", "blue", "purple", "olive", "crimson")
_MEAN_COLORS = [
    [0.984, 0.313, 0.169],
    [0.991, 0.916, 0.352],
    [0.673, 0.461, 0.580],
    [0.783, 0.832, 0.601],
    [0.088, 0.778, 0.982],
    [0.321, 0.961, 0.446],
    [0.025, 0.236, 0.759],
    [0.555, 0.102, 0.762],
    [0.208, 0.393, 0.019],
    [0.834, 0.202, 0.267],
]
_PARTS = ("train", "valid")
_REPLACE = "Replace the folder by the published one, or generate it anew."


# ------------------------------------------------------------------------------------------------------- generation


def cm10(card: Card, train: Digits, t10k: Digits) -> Splits:
    """Colour both parts; validation is cut from train, test is what LfF calls valid."""
    params = card.params
    images, color = zip(
        *(
            _tint(part, aligned, np.random.RandomState([params["seed"], number]), params)
            for number, (part, aligned) in enumerate(((train, 1 - params["skew"]), (t10k, params["test_aligned"])))
        ),
        strict=True,
    )
    splits = _split(images, [train.labels.astype(np.int64), t10k.labels.astype(np.int64)], color, params)
    return splits | {"train": replace(splits["train"], views=_recolored(images[0], splits["train"], params["seed"]))}


def _recolored(images: Tinted, train: Split, seed: int) -> dict[str, ImageSource]:
    """Views of the train split: each picture in the colour of one of another digit."""
    rows = train.image_rows()
    donor = donors(train.y, np.random.RandomState([seed, len(_PARTS)]))
    return {"color": Tinted(images.grey[rows], images.tints[rows[donor]])}


def colors_by_position(y: NDArray[np.int64], aligned: float) -> NDArray[np.int64]:
    """Colour (n,) of each example: within a class the first examples get colour 0, the next colour 1, and so on.

    The share `aligned` of a class gets its own colour, the others share the rest; borders are rounded half to even.
    """
    shares = aligned * np.eye(10) + (1 - aligned) / 9 * (1 - np.eye(10))
    color = np.zeros(len(y), np.int64)
    for digit in range(10):
        rows = np.flatnonzero(y == digit)
        ends = np.round(len(rows) * np.cumsum(shares[digit]))
        color[rows] = np.searchsorted(ends, np.arange(len(rows)), side="right")
    return color


def _tint(
    part: Digits, aligned: float, random: np.random.RandomState, params: dict[str, Any]
) -> tuple[Tinted, NDArray[np.int64]]:
    """The pictures of a part in their colours, and the colours (n,)."""
    color = colors_by_position(part.labels.astype(np.int64), aligned)
    tints = np.array(params["mean_colors"])[color] + params["std"] * random.randn(len(color), 3)
    return Tinted(part.images, np.clip(tints, 0, 1)), color


def _split(
    images: tuple[ImageSource, ...],
    y: list[NDArray[np.int64]],
    color: tuple[NDArray[np.int64], ...],
    params: dict[str, Any],
) -> Splits:
    held = hold_out(y[0], params["val"], np.random.RandomState(params["seed"]))
    splits: Splits = {}
    parts: dict[SplitName, NDArray[np.int64]] = {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}
    for name, rows in parts.items():
        splits[name] = Split(images[0], y[0][rows], color[0][rows][:, None], rows=rows)
    splits["test"] = Split(images[1], y[1], color[1][:, None])
    return splits


# ------------------------------------------------------------------------------------------------- published folders


def find_published(card: Card, root: Path | None) -> Path | None:
    """The folder that LfF's generator wrote for this card, if there is one; raises `MissingData` for a bad `root`."""
    name = _folder_name(card)
    places = [place / name for place in search("cmnist", root, what=card.name)]
    if root is not None and root.name == name:
        places.insert(0, root)
    return next((place for place in places if place.is_dir()), None)


def published_folder(card: Card, root: Path | None) -> Path:
    """The folder that is there; raises `MissingData` when it no longer is."""
    folder = find_published(card, root)
    if folder is None:
        raise MissingData(f"{card.name}: the folder {_folder_name(card)} is gone. Put it back, or name another --root.")
    return folder


def published_card(card: Card) -> Card:
    """The card of such a folder: other pixels, hence another name; its labels are those of the generated set."""
    note = "Read from a folder of LfF's generator, which draws without a seed: its colours are not the generated ones."
    return replace(
        card,
        name=card.called("published"),
        adaptable=True,
        params={**card.params, "published": True},
        interventions=(),
        sources=(),
        fetch_unasked=False,
        by_hand="LfF's generator (alinlab/LfF, `make_dataset.py`) writes it; put it into $WORSTGROUP_HOME/data/cmnist.",
        notes=(note, *card.notes),
    )


def read_published(card: Card, folder: Path) -> Splits:
    """Read a folder, pictures through a memory map; raises `CorruptFile` for what LfF's generator does not write."""
    (train, train_attrs), (valid, valid_attrs) = (_read_part(folder / part) for part in _PARTS)
    y, color = zip(*(attrs.T for attrs in (train_attrs, valid_attrs)), strict=True)
    return _split((train, valid), list(y), color, card.params)


def published_key(folder: Path) -> str:
    """Identity of a folder: the SHA-256 of its four arrays (0.2 s)."""
    return digest([_sha256(path) for path in _arrays(folder)])


def _folder_name(card: Card) -> str:
    return f"ColoredMNIST-Skewed{card.params['skew']}-Severity{card.params['severity']}"


def _arrays(folder: Path) -> Iterator[Path]:
    for part in _PARTS:
        yield from (folder / part / "images.npy", folder / part / "attrs.npy")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorruptFile(f"{path}: cannot be read: {error.strerror or error}. {_REPLACE}") from error


def _read_part(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures (n, 28, 28, 3) on disk, and digits and colours (n, 2)."""
    images, attrs = (_read_array(folder / f"{name}.npy") for name in ("images", "attrs"))
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28, 3):
        raise CorruptFile(
            f"{folder / 'images.npy'}: holds {images.dtype} {images.shape}, not uint8 (n, 28, 28, 3). {_REPLACE}"
        )
    if attrs.dtype.kind not in "iu" or attrs.shape != (len(images), 2):
        wanted = f"whole numbers ({len(images)}, 2): digit and colour of each picture"
        raise CorruptFile(f"{folder / 'attrs.npy'}: holds {attrs.dtype} {attrs.shape}, not {wanted}. {_REPLACE}")
    wrong = np.argwhere((attrs < 0) | (attrs > 9))
    if len(wrong):
        row, column = wrong[0]
        what = ("digit", "colour")[column]
        raise CorruptFile(f"{folder / 'attrs.npy'}: row {row}: {what} is {attrs[row, column]}, it must be 0 to 9")
    return images, np.asarray(attrs, np.int64)


def _read_array(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptFile(f"{path}: missing, truncated or not a NumPy array: {error}. {_REPLACE}") from error
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise CorruptFile(f"{path}: not a NumPy array of one entry per picture. {_REPLACE}")
    return array


# ------------------------------------------------------------------------------------------------------------- cards


@cache
def _counts(sizes: tuple[tuple[int, ...], ...], skew: float, aligned: float, val: float, seed: int) -> list[list[int]]:
    """Group counts of train, val and test; they depend only on how many pictures of each digit there are."""
    train, test = (np.repeat(np.arange(10), counts) for counts in sizes)
    group = 10 * train + colors_by_position(train, 1 - skew)
    held = hold_out(train, val, np.random.RandomState(seed))
    groups = (group[~held], group[held], 10 * test + colors_by_position(test, aligned))
    return [np.bincount(part, minlength=100).tolist() for part in groups]


def cm10_card(name: str, family: Family, skew: float, severity: int, std: float) -> Card:
    """The card of one ratio and severity; its counts are computed."""
    train, val, test = (tuple(part) for part in _counts(family.sizes, skew, 0.1, 0.1, 0))
    return family_card(
        name,
        family,
        "Nam, Cha, Ahn, Lee, Shin: Learning from Failure: Training Debiased Classifier from Biased Classifier, "
        "NeurIPS 2020. Capitani, Bolelli, Porrello and others: ClusterFix: A Cluster-Based Debiasing Approach without "
        "Protected-Group Supervision",
        title=f"Coloured {family.title}, ten classes x ten colours, {100 * skew:g} % not aligned, severity {severity}",
        classes=family.things,
        attributes=(Attribute("color", COLORS, aligned=tuple(range(10)), train_ratio=1 - skew),),
        image=(28, 28, 3),
        interventions=("color",),
        counts={"train": train, "val": val, "test": test},
        recipe=Recipe(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=256, epochs=100),
        backbone="mlp3x100",
        notes=(
            "The papers have no third split, LfF selects on the one it reports. Here that one is the test split, and "
            "validation is a tenth of each digit of train, drawn by the seed.",
            f"{sum(n == 0 for n in val)} of the 100 groups have no validation image, so a worst group over those that "
            "have one is a choice among few images. The papers' unbiased accuracy is acc_group.",
            "A group of the test split has about 100 images: the worst of 100 such groups is low by chance alone.",
            "Colours are given by position within a class: the order of the files carries the bias.",
            "Severities 1 to 3, with colours that vary more, are variants too: cm10-s1, cm10-2-s3.",
            "ClusterFix does not print its ratio; its ERM (74.5) is nearest to LfF's at 5 %.",
        ),
        params={
            "skew": skew,
            "severity": severity,
            "std": std,
            "test_aligned": 0.1,
            "mean_colors": _MEAN_COLORS,
            "val": 0.1,
            "seed": 0,
        },
    )


def cm10_variants(prefix: str, family: Family, rare: bool = False) -> dict[str, Card]:
    """Cards by variant: `cm10[-2|-1|-0.5]` at severity 4, or the `rare` ones, which end in `-s1` to `-s3`."""
    names = [(skew, severity) for skew in SKEWS for severity in SEVERITIES if bool(severity) == rare]
    return {
        (variant := f"cm10{skew}{severity}"): cm10_card(
            f"{prefix}:{variant}", family, SKEWS[skew], *SEVERITIES[severity]
        )
        for skew, severity in names
    }
