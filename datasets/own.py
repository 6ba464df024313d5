"""Labels of users' own data: classes, values and splits as they are found, and what a card says of them.

Classes and values are texts, sorted, in numeric order where all of them are numbers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, UserError
from ..benchmark.metrics import group_index, lift
from ..benchmark.pools import ImageSource
from ..benchmark.spec import SPLITS, Attribute, SplitName
from ..benchmark.store import Split, Splits

SPLIT_NAMES = {"train": 0, "val": 1, "test": 2, "valid": 1, "validation": 1, "0": 0, "1": 1, "2": 2}
MOST_GROUPS = 10_000
"""More of them come from a column that is no attribute, such as an identifier."""

Where = Callable[[int], str]
"""How the i-th example is named in messages."""
Ints = NDArray[np.int64]
_NUMBER = re.compile(r"-?\d+(\.\d*)?")


class Column(NamedTuple):
    """Classes or an attribute: its values, and the code of every example (n,) in them."""

    name: str
    values: tuple[str, ...]
    codes: Ints


@dataclass(frozen=True, eq=False)
class Labels:
    """Classes, attributes and split (n,) of every example, as numbers in the order of `SPLITS`."""

    y: Column
    attributes: tuple[Column, ...]
    split: Ints

    def rows(self, name: SplitName) -> Ints:
        """Examples of one split."""
        return np.flatnonzero(self.split == SPLITS.index(name))

    def splits(self, images: ImageSource, unit: Ints | None = None) -> Splits:
        """All splits of images (n) that lie in the order of the labels."""
        a = np.stack([attribute.codes for attribute in self.attributes], axis=1)
        return {
            name: Split(images, self.y.codes[rows], a[rows], None if unit is None else unit[rows], rows)
            for name in SPLITS
            for rows in [self.rows(name)]
        }

    def facts(self) -> dict[str, Any]:
        """What a card says of them: classes, attributes and counts."""
        shape = (len(self.y.values), *(len(attribute.values) for attribute in self.attributes))
        a = np.stack([attribute.codes for attribute in self.attributes], axis=1)
        group = group_index(self.y.codes, a, shape)
        counts = {
            name: tuple(np.bincount(group[self.rows(name)], minlength=int(np.prod(shape))).tolist()) for name in SPLITS
        }
        train = np.array(counts["train"])
        attributes = tuple(
            Attribute(name, values, lift(train, shape, j)) for j, (name, values, _) in enumerate(self.attributes)
        )
        return {"classes": self.y.values, "attributes": attributes, "counts": counts}


def read_column(name: str, cells: NDArray[np.str_], where: Where) -> Column:
    """A column of texts (n,); raises `CorruptFile` for an empty cell, a negative number, and one in two spellings."""
    found, first, codes = np.unique(cells, return_index=True, return_inverse=True)
    texts: list[str] = found.tolist()
    for text, row in zip(texts, first.tolist(), strict=True):
        if not text.strip() or (text.startswith("-") and _NUMBER.fullmatch(text)):
            raise CorruptFile(f"{where(row)}: {name} is {text!r}, it must be a name or a number from 0")
    if all(_NUMBER.fullmatch(text) for text in texts):
        numbers = [Decimal(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: numbers[i])
        for i, j in pairwise(order):
            if numbers[i] == numbers[j]:
                raise CorruptFile(
                    f"{where(first[j])}: {name} is {texts[j]!r}, the same number is {texts[i]!r} elsewhere"
                )
        texts, codes = [texts[i] for i in order], np.argsort(order)[codes]
    return Column(name, tuple(texts), np.asarray(codes, np.int64))


def check(labels: Labels, what: str) -> None:
    """Raise `CorruptFile` for labels that make no dataset: too few classes or values, an empty split, a class without
    train images, groups without number.
    """
    y, attributes = labels.y, labels.attributes
    if len(y.values) < 2:
        raise CorruptFile(f"{what}: has one class only, {y.values[0]!r}; it needs two or more")
    names = [attribute.name for attribute in attributes]
    for name, _, codes in attributes:
        if not name or "," in name or names.count(name) > 1:
            raise CorruptFile(f"{what}: {name!r} is no name of an attribute: each needs its own, without commas")
        if (codes == codes[0]).all():
            raise CorruptFile(f"{what}: attribute {name} has one value only: it makes no groups")
    for split in SPLITS:
        if not len(labels.rows(split)):
            raise CorruptFile(f"{what}: the {split} split is empty; train, val and test all need images")
    images = np.bincount(y.codes[labels.rows("train")], minlength=len(y.values))
    if not images.all():
        raise CorruptFile(f"{what}: class {y.values[int(images.argmin())]!r} never occurs in train")
    groups = len(y.values) * int(np.prod([float(len(attribute.values)) for attribute in attributes]))
    if groups > MOST_GROUPS:
        longest = max(attributes, key=lambda attribute: len(attribute.values))
        raise CorruptFile(
            f"{what}: {len(y.values)} classes and {len(attributes)} attributes make {groups:,} groups, more than "
            f"{MOST_GROUPS:,}; leave some out ({longest.name} has {len(longest.values):,} values)"
        )


# --------------------------------------------------------------------------------------------------------- their names


def slug(name: str) -> str:
    """A name of letters, digits, - and _, so that it can be part of a dataset's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "data"


def check_variant(dataset: str, name: str) -> None:
    """Raise `UserError` for a name that cannot be part of a dataset's name."""
    if name and slug(name) != name:
        raise UserError(f"{dataset}:{name}: a name has letters, digits, - and _ only; for other names give --root")
