"""One split of a dataset, images with what is known of them, and its identity."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .pools import ImageSource
from .spec import SplitName, digest


@dataclass(frozen=True, eq=False)
class Split:
    """Images, labels `y` (n,), attributes `a` (n, k), and the independent unit of each example (n,).

    Example i is image `rows[i]`, or image i without `rows`. Examples that show the same object (one digit on several
    backgrounds) share a unit; intervals resample units. `env` (n,) numbers the training environments of the card.

    `views` has, for each of the card's interventions, an image of every example (in their order, not by `rows`): the
    example with that shortcut taken from a random example of another class, and all else kept. Only train has any.
    """

    images: ImageSource
    y: NDArray[np.int64]
    a: NDArray[np.int64]
    unit: NDArray[np.int64] | None = None
    rows: NDArray[np.int64] | None = None
    env: NDArray[np.int64] | None = None
    views: Mapping[str, ImageSource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sys.audit("worstgroup.split")  # heard by `guard`, while a method fits

    def __len__(self) -> int:
        return len(self.y)

    def take(self, chosen: NDArray[np.int64]) -> "Split":
        """These examples, in this order, as a split of the same images; without views."""
        unit, env = (None if part is None else part[chosen] for part in (self.unit, self.env))
        return Split(self.images, self.y[chosen], self.a[chosen], unit, self.image_rows()[chosen], env)

    def units(self) -> NDArray[np.int64]:
        """Unit of each example; by default each is its own."""
        return np.arange(len(self.y)) if self.unit is None else self.unit

    def image_rows(self) -> NDArray[np.int64]:
        """Row of each example in `images`."""
        return np.arange(len(self.y)) if self.rows is None else self.rows


Splits = dict[SplitName, Split]


def splits_key(splits: Splits) -> str:
    """Identity of splits whose images know their own: a `source_key` for datasets that read files."""
    pictures = {name: [split.images, *split.views.values()] for name, split in splits.items()}
    return digest(
        {name: [split_hash(splits[name]), *(cast(Any, one).key for one in pictures[name])] for name in splits}
    )


def split_hash(split: Split) -> str:
    """SHA-256 of everything of a split but its pixels."""
    content = hashlib.sha256()
    for name, part in labels_of(split).items():
        content.update(name.encode() + part.tobytes())
    return content.hexdigest()


def labels_of(split: Split) -> dict[str, NDArray[np.int64]]:
    """All of a split but its pixels, as they are stored; what it does not have is left out."""
    parts = {"y": split.y, "a": split.a, "unit": split.units(), "rows": split.rows, "env": split.env}
    return {name: np.ascontiguousarray(part, dtype=np.int64) for name, part in parts.items() if part is not None}
