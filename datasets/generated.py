"""generated: noise with a faint class and a loud shortcut, in any size and number: what `worstgroup profile` times on.

`generated:64` has 512 train images of 64 x 64 pixels, `generated:64x2048` has 2,048 of them. What a step costs
depends on the shape of its images, not on what they show, so that nothing needs to be fetched to measure a method.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Attribute, Card, Recipe, SplitName
from ..benchmark.store import Split, Splits

SMALLEST, FEWEST = 8, 40
"""Pixels of a side, so that class and shortcut have room; train images, so that no group is empty."""
DEFAULT = 512
ALIGNED: dict[SplitName, float] = {"train": 0.9, "val": 0.75, "test": 0.5}
SHARE: dict[SplitName, float] = {"train": 1.0, "val": 0.5, "test": 0.25}
"""Images of a split, as a share of those of train."""


def make_card(variant: str) -> Card | None:
    """The card of `SIZE` or `SIZExIMAGES`, None for another text or too small a number."""
    found = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,6}))?", variant)
    size, images = (int(found[1]), int(found[2] or DEFAULT)) if found else (0, 0)
    return _card(variant, size, images) if size >= SMALLEST and images >= FEWEST else None


def _card(variant: str, size: int, images: int) -> Card:
    return Card(
        name=f"generated:{variant}",
        title=f"{images:,} train images of noise, {size}x{size} px, for `worstgroup profile`",
        classes=("low", "high"),
        attributes=(Attribute("corner", ("off", "on"), aligned=(0, 1), train_ratio=_ratio(images)),),
        image=(size, size, 3),
        counts={name: _counts(name, images) for name in SPLITS},
        licence="Apache-2.0 (drawn by this package)",
        citation="none",
        recipe=Recipe(optimizer="sgd", lr=1e-3, batch_size=32, epochs=2),
        backbone="resnet18",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        notes=("Made to measure what methods cost: what they score on it means nothing.",),
    )


def _counts(name: SplitName, images: int) -> tuple[int, int, int, int]:
    """Images of a split by class and shortcut; both classes are equally large."""
    half = round(images * SHARE[name]) // 2
    aligned = round(half * ALIGNED[name])
    return aligned, half - aligned, half - aligned, aligned


def _ratio(images: int) -> float:
    aligned, other, *_ = _counts("train", images)
    return aligned / (aligned + other)


@dataset("generated", {"64": _card("64", 64, DEFAULT)}, make=make_card)
class Planted:
    """The generator."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def source_key(self, root: Path | None) -> str:
        """There is no source but this file; `root` is not used."""
        return f"generated, version 1: {self.card.name}"

    def load(self, root: Path | None) -> Splits:
        """Draw all splits from one legacy NumPy stream, which is frozen: the same pixels everywhere."""
        random = np.random.RandomState(0)
        return {name: draw(self.card.counts[name], self.card.image[0], random) for name in SPLITS}


def draw(counts: tuple[int, ...], size: int, random: np.random.RandomState) -> Split:
    """One split with exactly these group counts (4,), shuffled."""
    cells = np.repeat([(0, 0), (0, 1), (1, 0), (1, 1)], counts, axis=0).astype(np.int64)
    cells = cells[random.permutation(len(cells))]
    images = random.randint(0, 160, (len(cells), size, size, 3), dtype=np.uint8)
    return Split(paint(images, cells), cells[:, 0], cells[:, 1:])


def paint(images: NDArray[np.uint8], cells: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Brighten, in place, the middle of the images (n, s, s, 3) of the second class, and a corner of those with it."""
    size = images.shape[1]
    y, corner = cells[:, 0] == 1, cells[:, 1] == 1
    middle = slice(size * 3 // 8, size * 5 // 8)
    images[np.flatnonzero(y), middle, middle, 0] += 50
    images[np.flatnonzero(corner), size * 3 // 4 :, size * 3 // 4 :, 2] += 90
    return images
